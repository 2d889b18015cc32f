"""Versions and their states: what is kept, what may follow what, what is refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.difference import compare
from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import RegistryError, TransitionError, UnknownVersionError
from slipstream.engine.errors import ModelError
from tests.forking import Forks

Add = Callable[..., int]


@pytest.fixture
def add(registry: Registry, make_head: Any) -> Add:
    def add(seed: int = 0, **fields: Any) -> int:
        version = registry.add(*make_head(seed), **({"target": "model A", "origin": "trained"} | fields))
        return version.version

    return add


def states(registry: Registry) -> dict[int, str]:
    return {each.version: each.state for each in registry.list(pruned=True)}


def test_a_version_comes_back_as_it_was_added(registry: Registry, make_head: Any) -> None:
    config, tensors = make_head(3)
    began = datetime(2026, 1, 2, tzinfo=UTC)
    training = Training(samples=5, tokens=700, steps=20, began=began, ended=began)
    parent = registry.add(config, tensors, target="model A", origin="cold").version
    added = registry.add(
        *(config, tensors),
        target="model A",
        target_name="A",
        origin="trained",
        parent=parent,
        route="acme",
        training=training,
        gate={"accept_length": 1.9},
        note="first",
    )
    again = Registry(registry.folder).get(added.version)
    assert again == added
    assert (again.state, again.route, again.pinned) == ("candidate", "acme", False)
    manifest = again.manifest
    assert (manifest.parent, manifest.training, manifest.gate) == (parent, training, {"accept_length": 1.9})
    assert (manifest.target_name, manifest.note, manifest.origin) == ("A", "first", "trained")
    assert manifests.read(registry.path(added.version)) == manifest
    read_config, read = registry.open_version(added.version, "model A")
    assert read_config == config
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_what_does_not_fit_its_configuration_is_not_published(registry: Registry, make_head: Any) -> None:
    config, tensors = make_head(0)
    del tensors["fc.weight"]
    with pytest.raises(ModelError, match=r"fc\.weight"):
        registry.add(config, tensors, target="model A", origin="trained")
    with pytest.raises(UnknownVersionError, match="7"):
        registry.add(*make_head(0), target="model A", origin="trained", parent=7)
    assert registry.list() == []
    assert list((registry.folder / "versions").iterdir()) == []


def test_promotions_and_rollbacks(registry: Registry, add: Add) -> None:
    first, second, third = add(), add(), add()
    registry.promote(first)
    registry.start_canary(second, "gate passed")
    assert registry.live() is not None and registry.live().version == first  # type: ignore[union-attr]
    registry.promote(second, "canary passed")
    registry.promote(third)
    assert states(registry) == {first: "retired", second: "retired", third: "live"}
    assert registry.predecessor().version == second  # type: ignore[union-attr]
    assert registry.roll_back(reason="worse").version == second  # type: ignore[union-attr]
    assert registry.roll_back().version == first  # type: ignore[union-attr]
    assert states(registry) == {first: "live", second: "rolled-back", third: "rolled-back"}
    assert registry.roll_back() is None
    with pytest.raises(TransitionError, match="neither"):
        registry.roll_back()
    events = registry.history(third)
    assert [(event.action, event.before, event.after, event.reason) for event in events] == [
        ("added", "", "candidate", "trained"),
        ("promoted", "candidate", "live", ""),
        ("rolled back", "live", "rolled-back", "worse"),
    ]
    whole = registry.history()
    assert [event.id for event in whole] == sorted(event.id for event in whole)
    assert registry.history(after=whole[3].id) == whole[4:]


def test_a_rolled_back_canary_leaves_the_live_version_alone(registry: Registry, add: Add) -> None:
    first, second, third = add(), add(), add()
    registry.promote(first)
    registry.promote(second)
    registry.start_canary(third)
    assert registry.canary().version == third  # type: ignore[union-attr]
    with pytest.raises(TransitionError, match=f"version {first} neither live nor as canary"):
        registry.roll_back(version=first)
    assert registry.roll_back().version == second  # type: ignore[union-attr]
    assert registry.canary() is None
    assert states(registry) == {first: "retired", second: "live", third: "rolled-back"}


def test_a_live_version_can_be_rolled_back_beside_a_canary(registry: Registry, add: Add) -> None:
    first, second, third = add(), add(), add()
    registry.promote(first)
    registry.promote(second)
    registry.start_canary(third)
    assert registry.roll_back(version=second).version == first  # type: ignore[union-attr]
    assert states(registry) == {first: "live", second: "rolled-back", third: "canary"}


def test_illegal_transitions_change_nothing(registry: Registry, add: Add) -> None:
    bad, live, canary, other = add(), add(), add(), add()
    registry.promote(bad)
    registry.roll_back()
    registry.promote(live)
    registry.start_canary(canary)
    before, events = registry.list(), registry.history()
    for change, version in (
        (registry.promote, bad),
        (registry.promote, live),
        (registry.start_canary, bad),
        (registry.start_canary, live),
        (registry.start_canary, other),
        (registry.retire, bad),
    ):
        with pytest.raises(TransitionError):
            change(version)
    for operation in (registry.get, registry.promote, registry.start_canary, registry.retire, registry.pin):
        with pytest.raises(UnknownVersionError, match="99"):
            operation(99)
    assert (registry.list(), registry.history()) == (before, events)


def test_routes_do_not_meet(registry: Registry, add: Add) -> None:
    shared, acme, newer = add(), add(route="acme"), add(route="acme")
    for version in (shared, acme, newer):
        registry.promote(version)
    assert registry.live().version == shared  # type: ignore[union-attr]
    assert registry.live("acme").version == newer  # type: ignore[union-attr]
    assert registry.live("nobody") is None
    assert [each.version for each in registry.list("acme")] == [acme, newer]
    assert registry.roll_back("acme").version == acme  # type: ignore[union-attr]
    assert registry.live().version == shared  # type: ignore[union-attr]


def test_pruning_spares_what_is_needed(registry: Registry, add: Add) -> None:
    versions = [add(seed) for seed in range(8)]
    oldest, pinned, early, before, live, canary, left, newest = versions
    for version in (early, before, live):
        registry.promote(version)
    registry.start_canary(canary)
    registry.pin(pinned, "a good one")
    add(route="other")
    assert registry.prune(keep=1, route="") == [oldest, early, left]
    assert [each.version for each in registry.list("")] == [pinned, before, live, canary, newest]
    registry.unpin(pinned)
    assert registry.prune(keep=0) == [pinned, newest, newest + 1]
    for version in (oldest, pinned):
        assert not registry.path(version).exists()
        assert registry.get(version).state == "pruned"
        with pytest.raises(UnknownVersionError, match="pruned"):
            registry.open_version(version, "model A")
        with pytest.raises(TransitionError, match="pruned"):
            registry.promote(version)
        with pytest.raises(TransitionError, match="pruned"):
            registry.pin(version)
    assert registry.roll_back().version == live  # type: ignore[union-attr]
    assert registry.roll_back().version == before  # type: ignore[union-attr]
    assert add() == newest + 2, "numbers are never used twice"
    with pytest.raises(RegistryError, match="-1"):
        registry.prune(-1)


def test_metrics_keep_their_latest_value(registry: Registry, add: Add) -> None:
    version = add()
    registry.record_metrics(version, {"live_accept_length": 1.5, "requests": 10})
    registry.record_metrics(version, {"live_accept_length": 1.7})
    assert registry.get(version).metrics == {"live_accept_length": 1.7, "requests": 10}


def test_what_is_no_number_is_no_score(registry: Registry, add: Add) -> None:
    version = add()
    with pytest.raises(RegistryError, match="accept_length is nan"):
        add(gate={"accept_length": float("nan")})
    with pytest.raises(RegistryError, match="loss is inf"):
        registry.record_metrics(version, {"loss": float("inf")})
    assert [each.version for each in registry.list()] == [version]


def test_a_version_whose_folder_cannot_be_put_in_place_does_not_exist(
    registry: Registry, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = add()

    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.is_relative_to(registry.folder):
            raise OSError(28, "No space left on device")
        return rename(path, target)  # of others in this process

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ModelError, match="No space left"):
        add()
    monkeypatch.undo()
    assert [each.version for each in registry.list(pruned=True)] == [kept]
    assert list((registry.folder / "versions").iterdir()) == [registry.path(kept)]
    registry.open_version(add(), "model A")


def test_differences(registry: Registry, make_head: Any) -> None:
    config, tensors = make_head(0)
    first = registry.add(config, tensors, target="A", origin="cold", gate={"accept_length": 1.5, "old": 1}).version
    moved = dict(tensors) | {"fc.weight": tensors["fc.weight"] * 1.5}
    second = registry.add(config, moved, target="A", origin="trained", parent=first, gate={"accept_length": 1.75})
    difference = compare(registry, first, second.version)
    assert difference.fields["parent"] == (None, first)
    assert difference.fields["origin"] == ("cold", "trained")
    assert "target" not in difference.fields
    assert difference.gate == {"accept_length": (1.5, 1.75), "old": (1, None)}
    assert difference.weights["fc.weight"] == pytest.approx(0.5, rel=0.01)
    assert difference.weights["norm.weight"] == 0
    registry.prune(0)
    assert compare(registry, first, second.version).weights == {}


def truncate(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def flip(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)


def edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated"),
        (flip, "damaged: its SHA-256"),
        (edit(format_version=2), "format 2.*up to 1"),
        (edit(format_version=2, origin={"kind": "new"}), "format 2.*up to 1"),
        (edit(target="model B"), "not the one that was published"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no drafter manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "no drafter manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors"),
        (shutil.rmtree, "manifest.json"),
    ],
)
def test_spoiled_versions_are_refused(
    registry: Registry, add: Add, spoil: Callable[[Path], None], message: str
) -> None:
    """And nothing else is touched: the live version opens, the states are what they were."""
    live, spoiled = add(1), add(2)
    registry.promote(live)
    spoil(registry.path(spoiled))
    before = registry.list()
    with pytest.raises(ModelError, match=message):
        registry.open_version(spoiled, "model A")
    again = Registry(registry.folder)
    assert again.list() == before
    again.open_version(live, "model A")


def test_a_version_for_another_model_is_refused_with_both_names(registry: Registry, add: Add) -> None:
    version = add(target_name="smol")
    with pytest.raises(ModelError, match=r"smol \(model A\).*large \(model B\)"):
        registry.open_version(version, "model B", "large")


def test_leftovers_are_removed_when_nobody_writes(registry: Registry, add: Add) -> None:
    kept = add()
    versions = registry.folder / "versions"
    shutil.copytree(registry.path(kept), versions / ".new-abc")
    shutil.copytree(registry.path(kept), registry.path(kept + 1))
    with pytest.raises(UnknownVersionError):
        registry.open_version(kept + 1, "model A")
    Registry(registry.folder)
    assert list(versions.iterdir()) == [registry.path(kept)]


def test_a_leftover_under_the_next_number_does_not_get_in_the_way(registry: Registry, add: Add) -> None:
    shutil.copytree(registry.path(add()), registry.path(2))
    (registry.path(2) / "more").touch()
    assert add(5) == 2
    assert not (registry.path(2) / "more").exists()
    registry.open_version(2, "model A")


def test_what_is_being_written_is_left_alone(
    registry: Registry, make_head: Any, monkeypatch: Any, forks: Forks
) -> None:
    """Another process opens the registry while a version lies half-written in its folder."""
    from slipstream.drafter.registry import registry as module

    write = module.write_weights
    folders: list[Path] = []

    def write_and_be_disturbed(folder: Path, *arguments: Any) -> Any:
        written = write(folder, *arguments)
        code = "import sys; from slipstream.drafter.registry.registry import Registry; Registry(sys.argv[1])"
        with forks.start(code, str(registry.folder)) as other:
            assert other.wait(300) == 0, other.stderr.read()
        folders.append(folder)
        assert folder.is_dir()
        return written

    monkeypatch.setattr(module, "write_weights", write_and_be_disturbed)
    version = registry.add(*make_head(0), target="model A", origin="trained")
    assert len(folders) == 1
    registry.open_version(version.version, "model A")


def test_threads_share_a_registry(registry: Registry, make_head: Any) -> None:
    added: list[int] = []

    def work(seed: int) -> None:
        for _ in range(4):
            version = registry.add(*make_head(seed), target="model A", origin="trained").version
            registry.promote(version)
            added.append(version)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == list(range(1, 17))
    assert list(states(registry).values()).count("live") == 1


def test_folders_that_are_no_registry_are_refused(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ModelError, match="no drafter registry"):
        Registry(tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot create"):
        Registry(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "registry.sqlite").write_text("not a database at all" * 100)
    with pytest.raises(ModelError, match="not a database"):
        Registry(tmp_path / "other")
    with sqlite3.connect(registry.folder / "registry.sqlite") as database:
        database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ModelError, match="format 9"):
        Registry(registry.folder)


def test_only_the_owner_can_read_it(registry: Registry) -> None:
    assert registry.folder.stat().st_mode & 0o077 == 0
