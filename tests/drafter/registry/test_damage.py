"""Whatever happens to a registry's files: no exception but our own, and what is whole stays usable."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.head import layout
from slipstream.drafter.registry.database import RegistryUnusableError
from slipstream.drafter.registry.manifest import decode
from slipstream.drafter.registry.registry import DATABASE_FILE, Registry, is_registry
from slipstream.engine.errors import ModelError, SlipstreamError, UnreadableError

Make = Callable[[int], Any]
Damage = tuple[int, str, float, int]
damages = st.tuples(
    st.integers(0, 50),  # which file
    st.sampled_from(["flip", "flip", "truncate", "delete", "folder", "rubbish", "empty", "append"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 255),
)


def harm(path: Path, kind: str, place: float, value: int) -> None:
    content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    if kind in ("delete", "folder"):
        path.unlink(missing_ok=True) if not path.is_dir() else shutil.rmtree(path)
        if kind == "folder":
            path.mkdir()
        return
    if path.is_dir():
        return
    if kind == "flip" and content:
        content[int(place * len(content))] = value
    elif kind == "truncate":
        del content[int(place * len(content)) :]
    elif kind == "rubbish":
        content[:] = os.urandom(len(content) + 1)
    elif kind == "empty":
        content.clear()
    elif kind == "append":
        content += bytes([value]) * 100
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from slipstream.engine.models.config import decoder_config
    from tests.drafter.registry.conftest import TARGET

    registry = Registry(tmp_path_factory.mktemp("whole") / "registry")
    config = layout.config_for(decoder_config(TARGET), 48)
    for seed in range(4):
        added = registry.add(config, layout.random_tensors(config, seed), target="t", origin="trained")
        if seed < 3:
            registry.promote(added.version)
        registry.record_metrics(added.version, {"trial": 1.0})
    registry.start_canary(4)
    return registry.folder


def use(registry: Registry, make_head: Make) -> None:
    """Everything there is to do with it; each does it, or says why not."""
    numbers = range(6)
    calls: list[Callable[[], Any]] = [
        *(registry.list, registry.count, registry.live, registry.canary, registry.predecessor, registry.may_serve),
        *(registry.history, registry.serving, registry.clean),
        *(lambda number=number: registry.get(number) for number in numbers),
        *(lambda number=number: registry.open_version(number, "t") for number in numbers),
        lambda: registry.record_metrics(1, {"a": 1.0}),
        lambda: registry.pin(2),
        lambda: registry.roll_back("", "why", 4),
        lambda: registry.roll_back("", "why"),
        lambda: registry.promote(1),
        lambda: registry.add(*make_head(9), target="t", origin="trained"),
        lambda: registry.retire(1),
        lambda: registry.prune(0),
        lambda: registry.get(10**30),
    ]
    for call in calls:
        with contextlib.suppress(SlipstreamError):
            call()


@settings(max_examples=25)
@given(some=st.lists(damages, min_size=1, max_size=3), opened_before=st.booleans())
def test_any_damage(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, make_head: Make, some: list[Damage], opened_before: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / "registry"
    shutil.copytree(whole, folder)
    registry = Registry(folder)
    files = sorted(path for path in folder.rglob("*"))
    touched = [files[which % len(files)] for which, *_ in some]
    for path, (_, kind, place, value) in zip(touched, some, strict=True):
        if path.exists() and (path.is_file() or kind == "delete"):
            harm(path, kind, place, value)
    if not opened_before:
        try:
            registry = Registry(folder, create=False)
        except SlipstreamError as error:
            assert str(folder) in str(error)
            registry = Registry(folder, open_now=False)
    harmed = {number for number in range(1, 5) if any(f"{number:06d}" in str(path) for path in touched)}
    if not any(path in (folder, folder / DATABASE_FILE, folder / "versions") for path in touched):
        assert [version.version for version in registry.list()] == [1, 2, 3, 4]
        for number in {1, 2, 3, 4} - harmed:
            registry.open_version(number, "t")
    use(registry, make_head)
    shutil.rmtree(folder.parent)


def test_what_a_version_says_of_its_manifest(whole: Path, tmp_path: Path, make_head: Make) -> None:
    shutil.copytree(whole, tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    newer = json.dumps(json.loads((registry.path(3) / "manifest.json").read_text()) | {"format_version": 9})
    for content in (newer, "", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "head": ' + "[" * 100_000):
        with contextlib.closing(sqlite3.connect(registry.folder / DATABASE_FILE)) as database, database:
            database.execute("UPDATE versions SET manifest = ? WHERE version = 3", (content.encode(),))
        versions = {version.version: version for version in registry.list()}
        assert versions.keys() == {1, 2, 3, 4} and versions[3].state == "live"
        assert "drafter version 3" in versions[3].damage and not versions[2].damage
        assert registry.may_serve() == [3, 2, 1]
        with pytest.raises(ModelError, match="drafter version 3"):
            registry.open_version(3, None)
    back = registry.roll_back("", "damaged", 3)
    assert back is not None and back.version == 2


def test_files_that_cannot_be_written(tmp_path: Path, make_head: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "registry")
    registry.promote(registry.add(*make_head(0), target="t", origin="trained").version)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slipstream.drafter.registry.version_folder._write", full)
    with pytest.raises(RegistryUnusableError, match="No space left"):
        registry.add(*make_head(1), target="t", origin="trained")
    monkeypatch.undo()
    assert [path.name for path in (registry.folder / "versions").iterdir()] == ["000001"]
    assert [version.version for version in registry.list()] == [1]
    with contextlib.closing(sqlite3.connect(registry.folder / DATABASE_FILE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr("slipstream.drafter.registry.database.BUSY_TIMEOUT_S", 0.05)
        for call in (registry.list, lambda: registry.pin(1), lambda: Registry(registry.folder)):
            with pytest.raises(RegistryUnusableError, match="locked"):
                call()
    assert is_registry(registry.folder) and registry.pin(1).pinned


names = st.sampled_from(
    ["architectures", "hidden_size", "num_attention_heads", "head_dim", "vocab_size", "draft_vocab_size", "bias",
     "rope_parameters", "rms_norm_eps", "eagle_config", "eagle_aux_hidden_state_layer_ids", "num_key_value_heads",
     "intermediate_size", "max_position_embeddings", "num_hidden_layers", "rope_theta", "norm_output"]
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(changes=st.dictionaries(names, values, max_size=3), missing=st.sets(names, max_size=2))
def test_any_configuration_of_a_head(make_head: Make, changes: dict[str, Any], missing: set[str]) -> None:
    config, tensors = make_head(0)
    given = {name: value for name, value in (config.to_json() | changes).items() if name not in missing}
    with contextlib.suppress(ModelError):
        layout.check(layout.parse_config(given, 8), tensors)
    with contextlib.suppress(ModelError):
        layout.parse_config(list(given), 8)  # type: ignore[arg-type]


@given(data=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_any_manifest(data: bytes) -> None:
    with contextlib.suppress(ModelError):
        decode(data, "a manifest")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_what_cannot_be_read_now_is_not_damaged(
    name: str, registry: Registry, make_head: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, or a disk that is away for a moment."""
    version = registry.add(*make_head(1), target="A", origin="trained").version
    opened = Path.open

    def open_file(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_file)
        with pytest.raises(UnreadableError, match="Too many open files"):
            registry.weights(version)
    (registry.path(version) / name).unlink()
    with pytest.raises(ModelError, match="No such file") as caught:
        registry.weights(version)
    assert not isinstance(caught.value, UnreadableError)
