"""What happens after a request has ended: the queue, redaction, purge, errors of the disk."""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.tap import make_listeners
from slipstream.drafter.traffic.writer import TrafficWriter
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import TrafficStats


class Stalled:
    """A redaction hook that holds the writer until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, sample: Sample) -> Sample:
        self.reached.set()
        assert self.go.wait(300)
        return sample


@pytest.fixture
def stalled() -> Iterator[Stalled]:
    hook = Stalled()
    yield hook
    hook.go.set()


def test_a_full_buffer_drops_samples_and_delays_nothing(
    tmp_path: Path, stalled: Stalled, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    page = 64 * 2 * 64 * 2
    tapped = tapped_engine(tmp_path / "t", config_for(), redact=stalled, buffer_bytes=3 * page)
    first = tapped.submit(prompts(20)[0])
    tapped.local.finish()
    assert stalled.reached.wait(300)
    # The writer stands still; the pages of the first are free again, and three more requests fill them.
    told = [tapped.submit(prompt) for prompt in prompts(21, 22, 23, 24, 25)]
    tapped.local.finish()
    assert all(completion.finish_reason == "length" for completion in [first, *told])
    assert tapped.writer.stats.kept == 0
    assert tapped.writer.stats.dropped == 2
    assert tapped.local.engine.core.stats().traffic.dropped == 2
    stalled.go.set()
    assert len(tapped.samples()) == 4
    assert tapped.writer.stats.kept == 4


def test_a_long_queue_drops_too(
    tmp_path: Path, stalled: Stalled, monkeypatch: pytest.MonkeyPatch, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    monkeypatch.setattr("slipstream.drafter.traffic.writer.MOST_WAITING", 2)
    tapped = tapped_engine(tmp_path / "t", config_for(), redact=stalled)
    tapped.submit(prompts(20)[0], traffic="tokens")
    tapped.local.finish()
    assert stalled.reached.wait(300)
    for prompt in prompts(21, 22, 23, 24):
        tapped.submit(prompt)
    tapped.local.finish()
    assert tapped.writer.stats.dropped == 2
    stalled.go.set()
    assert len(tapped.samples()) == 3


def test_redaction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    def redact(sample: Sample) -> Sample | None:
        match sample.num_prompt:
            case 10:
                return None
            case 11:
                return dataclasses.replace(sample, tokens=np.where(sample.tokens == sample.tokens[0], 0, sample.tokens))
            case 12:
                raise ValueError(f"private {sample.tokens.tolist()}")
            case 13:
                return dataclasses.replace(sample, tenant="somebody else", features=None)
        return sample

    tapped = tapped_engine(tmp_path / "t", config_for(), redact=redact)
    for prompt in prompts(10, 11, 12, 13, 14):
        tapped.submit(prompt, tenant="me")
    samples = {sample.num_prompt: sample for sample in tapped.samples()}
    assert samples.keys() == {11, 13, 14}
    assert samples[11].features is None and samples[11].tokens[0] == 0, "features would tell what was there"
    assert samples[13].features is None and samples[13].tenant == "me"
    assert samples[14].features is not None
    stats = tapped.writer.stats
    assert (stats.kept, stats.redacted, stats.dropped) == (3, 1, 1)
    assert "ValueError" in caplog.text and "private" not in caplog.text


def test_purge_reaches_running_and_waiting_requests(
    tmp_path: Path, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for())
    for tenant in ("alice", "bob"):
        tapped.submit(prompts(20)[0], tenant=tenant)
    for _ in range(5):
        tapped.local.step()
    other = TrafficStore(tmp_path / "t", create=False)
    other.purge("alice")
    other.close()
    assert {sample.tenant for sample in tapped.samples()} == {"bob"}
    assert b"alice" not in b"".join(path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file())


def test_a_full_disk_drops_samples_and_serving_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slipstream.drafter.traffic.store.save_file", full)
    tapped = tapped_engine(tmp_path / "t", config_for())
    assert tapped.submit(prompts(20)[0]).finish_reason is None
    assert tapped.samples() == []
    assert tapped.writer.stats.dropped == 1 and tapped.writer.stats.kept == 0
    assert not list((tmp_path / "t" / "shards").glob("*.safetensors"))


def test_a_failed_write_leaves_no_file_and_loses_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    """What happens when the disk is full: part of the file is written, or the index cannot be."""
    shards = tmp_path / "t" / "shards"

    def half(tensors: Any, path: Path) -> None:
        if sum(len(tensor) for name, tensor in tensors.items() if name.endswith(".tokens")) > 40:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("slipstream.drafter.traffic.store.save_file", half)
    tapped = tapped_engine(tmp_path / "t", config_for())
    for prompt, tenant in zip(prompts(10, 30, 12), ("alice", "bob", "carol"), strict=True):
        tapped.submit(prompt, tenant=tenant)
    assert {sample.tenant for sample in tapped.samples()} == {"alice", "carol"}
    stats = tapped.writer.stats
    assert (stats.kept, stats.dropped) == (2, 1) and "No space left" in stats.failure
    assert len(list(shards.iterdir())) == 2


def test_a_transaction_that_cannot_be_committed(tmp_path: Path, make_sample: Any) -> None:
    store = TrafficStore(tmp_path / "t")
    db = store.index._db
    db.execute("PRAGMA max_page_count = 12")  # SQLite's own "disk is full"
    with pytest.raises((sqlite3.OperationalError, ConfigError), match="full"):
        for _ in range(100):
            store.append([make_sample(domain="x" * 4000)])
    kept = len(store.questions())
    assert kept and len(list(store.index.shards.iterdir())) == 1
    db.execute("PRAGMA max_page_count = 10000")
    assert store.append([make_sample()]) == 1 and len(list(store.samples())) == kept + 1
    store.close()


def test_a_damaged_store_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    config_for: Any,
    tapped_engine: Any,
    prompts: Any,
) -> None:
    monkeypatch.setattr("slipstream.drafter.traffic.writer.REOPEN_S", 0.0)
    folder = tmp_path / "t"
    TrafficStore(folder).close()
    index = folder / "index.sqlite"
    whole = index.read_bytes()
    index.write_bytes(b"nonsense" * 1000)
    tapped = tapped_engine(folder, config_for())
    tapped.submit(prompts(20)[0])
    tapped.local.finish()
    wait_for(lambda: tapped.writer.stats.dropped == 1)
    assert "is damaged" in tapped.writer.stats.failure and str(folder) in tapped.writer.stats.failure
    (folder / "mended").write_bytes(whole)
    (folder / "mended").rename(index)
    wait_for(lambda: not tapped.writer.stats.failure)
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "until it can" in caplog.text
    tapped.submit(prompts(20)[0])
    assert len(tapped.samples()) == 1 and tapped.writer.stats.kept == 1
    assert f"kept again in {folder}; samples lost meanwhile: 1" in caplog.messages[1]


def test_the_log_says_which_folder_is_full_and_how_much_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make_sample: Any
) -> None:
    """The error of a full disk names no file."""
    monkeypatch.setattr("slipstream.drafter.traffic.writer.EVERY_S", 0.01)
    writer = TrafficWriter(lambda: TrafficStore(tmp_path / "t"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def is_done(count: int) -> bool:
        return writer.stats.kept + writer.stats.dropped == count

    for begun in (0, 4):  # of what was lost the first time it is not told again
        with monkeypatch.context() as patch:
            patch.setattr("slipstream.drafter.traffic.store.save_file", full)
            for done in range(begun + 1, begun + 4):
                writer.offer(make_sample)
                wait_for(partial(is_done, done))
        writer.offer(make_sample)
        wait_for(partial(is_done, begun + 4))
    writer.close()
    failed, again = caplog.messages[::2], caplog.messages[1::2]
    assert len(failed) == 2 and all(str(tmp_path / "t") in each and "No space left" in each for each in failed)
    assert again == [f"traffic is kept again in {tmp_path / 't'}; samples lost meanwhile: 3"] * 2


def test_what_is_being_kept_is_counted_once_all_of_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_sample: Any
) -> None:
    monkeypatch.setattr("slipstream.drafter.traffic.writer.EVERY_S", 300.0)
    keeping, go_on = threading.Event(), threading.Event()
    append = TrafficStore.append

    def slow(self: TrafficStore, samples: Sequence[Sample]) -> int:
        if samples[0].tenant == "last":
            keeping.set()
            assert go_on.wait(300)
        return append(self, samples)

    monkeypatch.setattr(TrafficStore, "append", slow)
    writer = TrafficWriter(lambda: TrafficStore(tmp_path))
    for tenant in ("first", "last"):
        writer.offer(partial(make_sample, tenant=tenant))
    closing = threading.Thread(target=writer.close)
    closing.start()
    assert keeping.wait(300)
    assert writer.stats == TrafficStats(), "the first is kept, but what the store holds is not known"
    go_on.set()
    closing.join(300)
    found = writer.stats
    assert (found.kept, found.dropped, found.store_tokens) == (2, 0, 24) and found.store_bytes > 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_engine_starts_beside_a_damaged_store(tmp_path: Path, config_for: Any) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "index.sqlite").write_bytes(b"nonsense" * 1000)
    options = TrafficConfig(traffic_log="tokens", traffic_folder=str(tmp_path / "t"))
    [tap] = make_listeners(options, config_for())
    assert "is damaged" in tap.stats.failure
    tap.close()
    (tmp_path / "t" / "index.sqlite").unlink()
    (tmp_path / "t" / "a file of somebody").touch()
    with pytest.raises(ConfigError, match="not empty"):  # nothing is damaged: the option is wrong
        make_listeners(options, config_for())


def test_a_folder_that_is_deleted_while_it_is_written_to_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    monkeypatch.setattr("slipstream.drafter.traffic.writer.REOPEN_S", 0.0)
    folder = tmp_path / "t"
    tapped = tapped_engine(folder, config_for())
    tapped.submit(prompts(20)[0])
    tapped.local.finish()
    wait_for(lambda: tapped.writer.stats.kept == 1)
    reader = TrafficStore(folder, create=False)
    shutil.rmtree(folder)
    wait_for(lambda: (folder / "index.sqlite").exists() and not tapped.writer.stats.failure)
    with pytest.raises(ConfigError, match="removed or replaced"):  # who reads it is not to wait for ever
        reader.questions()
    reader.close()
    tapped.submit(prompts(21)[0])
    tapped.local.finish()
    wait_for(lambda: tapped.writer.stats.kept == 2)
    shutil.rmtree(folder / "shards")
    tapped.submit(prompts(22)[0])
    [sample] = tapped.samples()
    assert sample.num_prompt == 22 and tapped.writer.stats.kept == 3
