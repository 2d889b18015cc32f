"""Whatever happens to the files of a traffic store: a sentence that names it, and what is whole stays usable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.engine.errors import ConfigError

Make = Callable[..., Sample]


def use(folder: Path) -> None:
    """Everything there is to do with a store; each does it, or says why not."""
    for call in (
        lambda store: list(store.samples()),
        lambda store: list(store.samples(order="recent", holdout=False)),
        lambda store: store.statistics(),
        lambda store: store.questions(),
        lambda store: store.index.files_since(),
        lambda store: store.index.check("target"),
        lambda store: store.lock(),
        lambda store: store.index.claim("target", "files"),
        lambda store: store.expire(),
        lambda store: store.purge("a"),
        lambda store: store.purge(),
    ):
        try:
            store = TrafficStore(folder, create=False)
        except ConfigError as error:
            assert str(folder) in str(error)
            continue
        try:
            call(store)
        except ConfigError as error:
            assert str(folder) in str(error)
        finally:
            store.close()


@settings(max_examples=25)
@given(
    some=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from(["flip", "flip", "truncate", "delete", "folder"]),
            st.floats(0, 1, exclude_max=True),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_damage(tmp_path_factory: pytest.TempPathFactory, make_sample: Make, some: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "t"
    store = TrafficStore(folder)
    for tenant in ("a", "b", "c"):
        store.append([make_sample(9, tenant=tenant)])
    store.close()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    touched = set()
    for which, kind, place, value in some:
        path = files[which % len(files)]
        touched.add(path)
        content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        if kind in ("delete", "folder") and path.is_file():
            path.unlink()
            if kind == "folder":
                path.mkdir()
        elif kind == "truncate" and path.is_file():
            path.write_bytes(content[: int(place * len(content))])
        elif path.is_file() and content:
            content[int(place * len(content))] = value
            path.write_bytes(content)
    if all(path.parent.name == "shards" for path in touched):
        whole = TrafficStore(folder, create=False)
        assert len(list(whole.samples())) >= 3 - len(touched)
        whole.close()
    use(folder)


def test_damaged_rows_are_left_out(tmp_path: Path, make_sample: Make) -> None:
    store = TrafficStore(tmp_path / "t")
    for tenant in ("a", "b", "c"):
        store.append([make_sample(9, tenant=tenant)])
    for fields in ("", "nonsense", "[]", "{}", '{"parts": 5}', '{"parts": ["0.tokens", "0.nothing"]}', "[" * 100_000):
        with store.index.transaction() as db:
            db.execute("UPDATE samples SET fields = ? WHERE tenant = 'b'", (fields,))
        assert [sample.tenant for sample in store.samples()] == ["a", "c"]
    store.close()
