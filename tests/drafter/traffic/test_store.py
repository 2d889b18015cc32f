"""The traffic store: what is read is what was kept, and what must go is gone from the disk."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sqlite3
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from slipstream.drafter.traffic import store as store_module
from slipstream.drafter.traffic.index import TrafficIndex, held_out
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.engine.errors import ConfigError
from tests.forking import Forks

Make = Callable[..., Sample]


def same(left: Sample, right: Sample) -> bool:
    """But for the id."""
    if not np.array_equal(left.tokens, right.tokens) or left.tokens.dtype != right.tokens.dtype:
        return False
    tensors = [(left.features, right.features), *zip(left.topk or [None], right.topk or [None], strict=True)]
    if any((a is None) != (b is None) or (a is not None and not torch.equal(a, b)) for a, b in tensors):  # type: ignore[arg-type]
        return False
    plain: dict[str, Any] = {"tokens": None, "features": None, "topk": None, "id": 0, "question": 0}
    return dataclasses.replace(left, **plain) == dataclasses.replace(right, **plain)


def contents(folder: Path) -> bytes:
    """The bytes of all files; read by another process, since closing SQLite's files here would let its locks go."""
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    return subprocess.run(["cat", *files], capture_output=True, check=True).stdout


def test_samples_come_back_as_they_were(tmp_path: Path, make_sample: Make) -> None:
    samples = [
        make_sample(9, tenant="a", domain="code", target_version=3, drafter_version=7, taps=(2, 3, 5)),
        make_sample(10, tenant="b", features=None, start=10, greedy=False),
        make_sample(11, tenant="a", topk=(torch.ones(6, 2, dtype=torch.int32), torch.zeros(6, 2).half())),
    ]
    store = TrafficStore(tmp_path / "t")
    assert store.append(samples) == 3
    reader = TrafficStore(tmp_path / "t", create=False)
    found = list(reader.samples())
    assert sorted(len(sample.tokens) for sample in found) == [9, 10, 11]
    for sample in found:
        [original] = [given for given in samples if len(given.tokens) == len(sample.tokens)]
        assert same(sample, original)
    assert len({sample.id for sample in found}) == 3 and min(sample.id for sample in found) > 0
    assert [len(sample.tokens) for sample in reader.samples(tenant="b")] == [10]
    reader.close()
    store.close()


@settings(max_examples=15)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(6, 40)), min_size=1, max_size=5), max_size=6))
def test_every_way_of_reading_agrees_with_a_list(
    tmp_path_factory: pytest.TempPathFactory, make_sample: Make, batches: list[list[tuple[str, int]]]
) -> None:
    store = TrafficStore(tmp_path_factory.mktemp("any") / "t")
    for batch in batches:
        store.append([make_sample(length, tenant=tenant) for tenant, length in batch])
    every = list(store.samples())
    wanted = Counter(itertools.chain.from_iterable(batches))
    assert Counter((sample.tenant, len(sample.tokens)) for sample in every) == wanted
    ids = [sample.id for sample in every]
    assert ids == sorted(set(ids))
    assert [sample.id for sample in store.samples(order="recent")] == ids[::-1]
    middle = ids[len(ids) // 2] if ids else 0
    assert [sample.id for sample in store.samples(since_id=middle, limit=3)] == [i for i in ids if i > middle][:3]
    assert store.questions() == {sample.id: sample.question for sample in every}
    for side in (True, False):
        expected = [sample.id for sample in every if held_out(sample.question) == side]
        assert [sample.id for sample in store.samples(holdout=side)] == expected
    assert [sample.tokens.tolist() for sample in store.samples(features=False)] == [s.tokens.tolist() for s in every]
    assert all(sample.features is None for sample in store.samples(features=False))
    for tenant, entry in store.statistics().items():
        own = [sample for sample in every if sample.tenant == tenant]
        assert (entry.samples, entry.tokens) == (len(own), sum(len(sample.tokens) for sample in own))
    # No shard has two tenants' samples.
    for shard in (store.index.shards).iterdir():
        owners = {entry.tenant for entry in store.index.entries(0, None, "oldest", None, 999) if entry.shard == shard}
        assert len(owners) == 1
    store.close()


def test_one_question_in_ten_is_held_out() -> None:
    assert 900 < sum(map(held_out, range(10_000))) < 1100
    assert 900 < sum(held_out(-(2**63) + number) for number in range(10_000)) < 1100


def test_a_question_is_its_prompt(tmp_path: Path, make_sample: Make) -> None:
    """Whoever asks, whatever the answer: all on one side."""
    first = make_sample(12, tenant="a", features=None, start=12)
    others = [
        dataclasses.replace(first, tenant="b", greedy=False),
        dataclasses.replace(first, tokens=np.append(first.tokens, 7).astype(np.int32)),
    ]
    changed = first.tokens.copy()
    changed[first.num_prompt - 1] += 1
    store = TrafficStore(tmp_path / "t")
    store.append([first, *others, dataclasses.replace(first, tokens=changed)])
    store.append([dataclasses.replace(first, num_prompt=first.num_prompt - 1)])
    counts = Counter(store.questions().values())
    assert sorted(counts.values()) == [1, 1, 3]
    store.close()


def test_a_store_of_the_first_format_is_taken_over(tmp_path: Path, make_sample: Make) -> None:
    """What was held out of training stays so: there the id decided."""
    store = TrafficStore(tmp_path / "t")
    store.append([make_sample(length) for length in range(6, 46)])
    store.close()
    with sqlite3.connect(tmp_path / "t" / "index.sqlite") as db:
        db.execute("ALTER TABLE samples DROP COLUMN question")
        db.execute("ALTER TABLE purges DROP COLUMN number")
        db.execute("PRAGMA user_version = 1")
    db.close()
    store = TrafficStore(tmp_path / "t")
    assert all(id_ == question for id_, question in store.questions().items())
    assert [sample.id for sample in store.samples(holdout=True)] == [i for i in range(1, 41) if held_out(i)]
    store.append([make_sample(50)])
    assert store.questions()[41] != 41
    store.close()


def test_iteration_is_lazy_and_survives_what_happens_meanwhile(
    tmp_path: Path, make_sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAGE", 2)
    store = TrafficStore(tmp_path / "t")
    for length in range(6, 12):
        store.append([make_sample(length, tenant="a")])
    reading = store.samples()
    assert len(next(reading).tokens) == 6
    store.append([make_sample(12, tenant="a")])  # the small shard is written again
    assert len(next(reading).tokens) == 7
    assert [len(sample.tokens) for sample in reading] == [8, 9, 10, 11, 12]
    reading = store.samples()
    next(reading)
    store.purge("a")
    assert list(reading) == []
    store.close()


def test_purge_reaches_disk_restart_and_what_waits(tmp_path: Path, make_sample: Make) -> None:
    marker = np.frombuffer(b"secret-of-alice!", np.int32)
    folder = tmp_path / "t"
    store = TrafficStore(folder)
    waiting = make_sample(20, tenant="alice", tokens=marker)
    for _ in range(3):
        store.append([waiting, make_sample(8, tenant="bob")])
    assert marker.tobytes() in contents(folder) and b"alice" in contents(folder)
    other = TrafficIndex(folder)  # another process
    assert other.purge("alice") == 3
    other.close()
    assert marker.tobytes() not in contents(folder) and b"alice" not in contents(folder)
    # What was sent before the purge does not come after it; what is sent later does.
    assert store.append([waiting, make_sample(8, tenant="bob")]) == 1
    assert marker.tobytes() not in contents(folder)
    store.close()
    store = TrafficStore(folder)
    assert {sample.tenant for sample in store.samples()} == {"bob"}
    assert store.append([waiting]) == 0
    assert store.append([make_sample(9, tenant="alice", after_purge=store.index.last_purge())]) == 1
    ids = [sample.id for sample in store.samples()]
    assert store.purge() == len(ids) == 5
    assert list(store.index.shards.iterdir()) == [] and store.statistics() == {}
    store.append([make_sample(9, after_purge=store.index.last_purge())])
    [sample] = store.samples()
    assert sample.id > max(ids), "ids are not given twice"
    store.close()


def test_the_oldest_goes_when_there_is_too_much(
    tmp_path: Path, make_sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SMALL_BYTES", 0)
    store = TrafficStore(tmp_path / "t", max_bytes=20_000)
    for length in range(50, 90):
        store.append([make_sample(length)])
    size, _ = store.index.totals()
    on_disk = sum(path.stat().st_size for path in store.index.shards.iterdir())
    assert size == on_disk <= 20_000
    lengths = [len(sample.tokens) for sample in store.samples()]
    assert lengths == list(range(90 - len(lengths), 90)) and len(lengths) > 5
    store.close()


def test_what_is_too_old_goes_also_at_start(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t", max_age=100.0)
    store.append([make_sample(8, tenant="a", time=time.time() - 200), make_sample(9, tenant="b")])
    assert [sample.tenant for sample in store.samples()] == ["b"]
    store.append([make_sample(8, tenant="a", time=time.time() - 60)])
    store.close()
    store = TrafficStore(tmp_path / "t", max_age=50.0)
    store.lock()
    assert [sample.tenant for sample in store.samples()] == ["b"]
    store.close()


def test_new_samples_do_not_join_a_shard_that_goes_soon(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t", max_age=100.0)
    store.append([make_sample(8, time=time.time() - 60)])
    store.append([make_sample(9)])
    store.append([make_sample(10)])
    shards = Counter(entry.shard for entry in store.index.entries(0, None, "oldest", None, 9))
    assert sorted(shards.values()) == [1, 2]
    store.close()


def test_only_the_owner_can_read(tmp_path: Path, make_sample: Make) -> None:
    before = os.umask(0)
    try:
        store = TrafficStore(tmp_path / "deep" / "t")
        store.append([make_sample(8)])
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "t").rglob("*")}
        assert len(found) >= 4
        assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in found.items()), found
        assert stat.S_IMODE((tmp_path / "deep" / "t").stat().st_mode) == 0o700
        store.close()
    finally:
        os.umask(before)


def test_one_process_appends(tmp_path: Path, make_sample: Make) -> None:
    first, second = TrafficStore(tmp_path / "t"), TrafficStore(tmp_path / "t")
    first.append([make_sample(8)])
    with pytest.raises(ConfigError, match="another server"):
        second.append([make_sample(9)])
    assert len(list(second.samples())) == 1
    first.close()
    assert second.append([make_sample(9)]) == 1
    second.close()


def test_wrong_folders_are_refused(tmp_path: Path, make_sample: Make) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        TrafficStore(tmp_path)
    with pytest.raises(ConfigError, match="no traffic store"):
        TrafficStore(tmp_path / "missing", create=False)
    assert not (tmp_path / "missing").exists()
    store = TrafficStore(tmp_path / "t")
    store.index.claim("model a", "files")
    store.append([make_sample(8)])
    with pytest.raises(ConfigError, match="another model"):
        store.index.claim("model b", "files")
    store.index.check("model a")
    with pytest.raises(ConfigError, match="--target-lineage must be"):
        store.index.check("model b")
    store.close()
    database = sqlite3.connect(tmp_path / "t" / "index.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="format 99"):
        TrafficStore(tmp_path / "t")
    (tmp_path / "t" / "index.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigError, match="damaged"):
        TrafficStore(tmp_path / "t")


WRITER = """
import sys
import time
import numpy as np, torch
from slipstream.drafter.traffic.store import Sample, TrafficStore
store = TrafficStore(sys.argv[1], max_bytes=400_000)
print("ready", flush=True)
for number in range(10**6):
    length = 20 + number % 60
    features = torch.full((length - 1, 3, 32), float(length)).bfloat16()
    store.append([Sample(tenant, "", 0, 0, time.time(), np.full(length, length, np.int32), 5, 0, features, None, True)
        for tenant in ("a", "b")])
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_a_readable_store(tmp_path: Path, forks: Forks) -> None:
    folder = tmp_path / "t"
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(4):
        with forks.start(WRITER, str(folder)) as writer:
            assert writer.stdout.readline() == "ready\n"
            for _ in range(int(rng.integers(1, 4))):
                writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            writer.kill()
        reader = TrafficStore(folder, create=False)
        ids = [sample.id for sample in reader.samples()]
        assert len(ids) > seen or reader.index.totals()[0] > 300_000
        assert len(ids) == sum(entry.samples for entry in reader.statistics().values()), "every row has its shard"
        seen = len(ids)
        reader.close()
    store = TrafficStore(folder)
    store.lock()
    files = {path.name for path in store.index.shards.iterdir()}
    assert files == {entry.shard.name for entry in store.index.entries(0, None, "oldest", None, 10**6)}
    for sample in store.samples():
        assert sample.features is not None and bool((sample.features == float(sample.tokens[0])).all())
    store.close()


def test_purge_also_takes_what_a_killed_writer_left(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t")
    store.append([make_sample(8, tenant="b")])
    left = [store.index.shards / name for name in ("0123.safetensors", "4567.safetensors.tmp", ".tmpAbC")]
    for path in left:
        path.write_bytes(b"alice")
    other = TrafficIndex(tmp_path / "t")
    other.purge("alice")
    assert [path.exists() for path in left] == [False, True, True], "they may be the writer's, which is alive"
    store.close()
    other.purge("alice")
    assert not any(path.exists() for path in left) and len(list(other.shards.iterdir())) == 1
    other.close()


def test_a_row_without_a_file_and_a_file_without_a_row_go(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t")
    store.append([make_sample(8, tenant="a"), make_sample(9, tenant="b")])
    [lost] = [entry.shard for entry in store.index.entries(0, "a", "oldest", None, 1)]
    lost.rename(lost.with_name("0123.safetensors"))
    assert [sample.tenant for sample in store.samples()] == ["b"]
    store.close()
    for name in ("4567.safetensors.tmp", ".tmpAbC"):
        (store.index.shards / name).write_bytes(b"half")
    store = TrafficStore(tmp_path / "t")
    store.lock()
    assert list(store.statistics()) == ["b"]
    [left] = store.index.shards.iterdir()
    with safe_open(left, framework="pt") as shard:
        assert "0.tokens" in set(shard.keys())
    store.close()


OPEN_AND_CLOSE = """
import sys
from slipstream.drafter.traffic.store import TrafficStore
store = TrafficStore(sys.argv[1])
print(len(store.questions()))
store.close()
"""


def test_a_store_that_is_opened_twice_keeps_its_locks(tmp_path: Path, make_sample: Make, forks: Forks) -> None:
    """Without them the next process to close the store takes itself for the last, and deletes the others' log."""

    def elsewhere() -> int:
        with forks.start(OPEN_AND_CLOSE, str(tmp_path / "traffic")) as process:
            said = process.stdout.read()
            assert process.wait(300) == 0, process.stderr.read()
        return int(said)

    store = TrafficStore(tmp_path / "traffic")
    store.lock()
    store.append([make_sample()])
    TrafficStore(tmp_path / "traffic").close()
    assert elsewhere() == 1
    assert (tmp_path / "traffic" / "index.sqlite-wal").exists()
    store.append([make_sample()])
    assert elsewhere() == 2
    store.close()
