"""The matrices of updated weights on their way from the engine to who trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.tap import make_listeners
from slipstream.drafter.traffic.target_file import EMBEDDING, OUTPUT, UpdatedWeights
from slipstream.drafter.traffic.writer import TrafficWriter
from slipstream.drafter.training.target import Target
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.models.loader import load_model
from slipstream.engine.operations import BeginTargetUpdate, FillTarget, FinishTargetUpdate
from slipstream.kernels.native.library import isa
from slipstream.kernels.weight import DenseWeight, Weight

CPU = torch.device("cpu")
KERNELS = ["torch", *(["native"] if isa() else [])]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
    weight = DenseWeight(rows, columns, dtype, CPU)
    weight.fill(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    return weight


def content(weight: Weight) -> torch.Tensor:
    return weight.rows(torch.arange(weight.n)).bfloat16()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_written_is_read(
    tmp_path: Path, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_file, "PIECE_BYTES", 100)  # pieces of three rows
    matrices = {EMBEDDING: matrix(50, 16, dtype)} | ({} if tied else {OUTPUT: matrix(50, 16, dtype)})
    updated = UpdatedWeights(3, time.time(), "target")
    assert target_file.read(tmp_path, "target") is None
    target_file.write(tmp_path, updated, matrices, CPU)
    found = target_file.read(tmp_path, "target")
    assert found is not None and found[0] == updated
    assert {name: tensor.tolist() for name, tensor in found[1].items()} == {
        name: content(weight).tolist() for name, weight in matrices.items()
    }
    assert target_file.read(tmp_path, "target", updated) == (updated, {}), "they need not be read again"
    assert target_file.read(tmp_path, "target of another lineage") is None
    target_file.write(tmp_path, UpdatedWeights(4, updated.since, "target"), matrices, CPU)
    found = target_file.read(tmp_path, "target", updated)
    assert found is not None and found[0].version == 4 and found[1].keys() == matrices.keys()
    assert [path.name for path in tmp_path.iterdir()] == [target_file.FILE], "no drafts are left"
    assert (tmp_path / target_file.FILE).stat().st_mode & 0o777 == 0o600
    target_file.remove(tmp_path)
    assert target_file.read(tmp_path, "target", updated) is None


@settings(max_examples=60)
@given(st.data())
def test_of_a_damaged_file_nothing_wrong_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    updated = UpdatedWeights(3, 5.0, "target")
    target_file.write(folder, updated, {EMBEDDING: matrix(4, 8)}, CPU)
    whole = (folder / target_file.FILE).read_bytes()
    head = len(whole) - 4 * 8 * 2
    if data.draw(st.booleans(), "cut"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, head - 1))
        damaged = whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]
    (folder / target_file.FILE).write_bytes(damaged)
    try:
        found = target_file.read(folder, "target")
    except ModelError as error:
        assert str(folder) in str(error)
        return
    if found is not None:
        assert isinstance(found[0], UpdatedWeights) and found[0].target == "target"


@pytest.mark.parametrize(("kernels", "lineage"), [(KERNELS[0], ""), (KERNELS[-1], "run 7")])
def test_what_an_update_brings_reaches_who_trains(
    tmp_path: Path, kernels: str, lineage: str, config_for: Any, tapped_engine: Any, prompts: Any, target: Path
) -> None:
    """From the engine, through the tap and the store, to the target of the training worker."""
    folder, config = tmp_path / "t", config_for(kernels=kernels, dtype="float32", threads=1, target_lineage=lineage)
    tapped = tapped_engine(folder, config, target=lambda: served_fingerprint(config))
    trained = Target(str(target), 48, 256, lineage)
    local, shape = tapped.local, json.loads((target / "config.json").read_text())
    tapped.submit(prompts(20)[0])
    local.finish()
    for version in (7, 8):  # one soon after the other
        tensors = dict(dummy_tensors(shape, version))
        operations = [BeginTargetUpdate(version), FillTarget(version, save(tensors)), FinishTargetUpdate(version)]
        for done in [local.engine.operate(operation) for operation in operations]:
            while not done.done():
                local.engine.poll()
                time.sleep(0.001)
            done.result()
    tapped.submit(prompts(21)[0])
    old, new = sorted(tapped.samples(), key=lambda sample: sample.num_prompt)

    store = TrafficStore(folder, create=False)
    assert trained.follow(store) and trained.serving.version == 8
    store.close()
    served = local.engine.loaded.model.decoder
    assert torch.equal(trained.embedding.bfloat16(), content(served.embedding))
    assert torch.equal(trained.output.bfloat16(), content(served.output))
    assert torch.equal(trained.output.bfloat16(), tensors["lm_head.weight"].bfloat16())
    assert (old.target_version, new.target_version) == (0, 8)
    assert new.features is not None and trained.unusable(new) is None
    assert trained.unusable(old) == (None if lineage else "other weights")


@pytest.mark.parametrize("version", [1, 0])
def test_of_a_request_that_two_weights_answered_only_tokens_are_kept(
    tmp_path: Path, version: int, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    """Whatever number the new ones have."""
    tapped = tapped_engine(tmp_path / "t", config_for())
    engine = tapped.local.engine
    tapped.submit(prompts(20)[0])
    for _ in range(5):
        tapped.local.step()
    engine.scheduler.target_version = version
    engine.listeners.target_changed(version, engine.loaded.model)
    tapped.submit(prompts(21)[0])
    first, second = sorted(tapped.samples(), key=lambda sample: sample.num_prompt)
    assert first.features is None and first.taps == () and first.start == len(first.tokens)
    assert second.features is not None and {first.target_version, second.target_version} == {version}


def test_a_file_of_an_earlier_run_goes_before_anything_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    TrafficStore(folder).close()
    old, new = (UpdatedWeights(version, 5.0, "target") for version in (3, 1))
    target_file.write(folder, old, {EMBEDDING: matrix(4, 8)}, CPU)
    writer = TrafficWriter(lambda: TrafficStore(folder))
    assert target_file.read(folder, "target") is None
    writer.target_changed(lambda place: target_file.write(place, new, {EMBEDDING: matrix(4, 8)}, CPU))
    writer.close()
    found = target_file.read(folder, "target")
    assert found is not None and found[0] == new


def test_weights_that_cannot_be_written_cost_no_sample(
    tmp_path: Path, config_for: Any, tapped_engine: Any, prompts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> str:
        raise OSError("the disk is full")

    tapped = tapped_engine(tmp_path / "t", config_for(), target=full)
    engine = tapped.local.engine
    engine.listeners.target_changed(1, engine.loaded.model)
    tapped.submit(prompts(20)[0])
    assert len(tapped.samples()) == 1 and tapped.writer.stats.dropped == 0
    assert caplog.text.count("writing the model's new weights for training failed") == 1
    assert target_file.read(tmp_path / "t", "target") is None


def test_a_store_of_a_lineage_is_one_for_all_its_weights(
    tmp_path: Path, config_for: Callable[..., EngineConfig], make_sample: Callable[..., Sample]
) -> None:
    """Beginning as the files have them, or at random; without a lineage these are two models."""
    lineages = ({}, {"target_lineage": "run 7"}, {"target_lineage": "run 8"})
    folder = tmp_path / "store"

    def start(**options: Any) -> float:
        """When the files became those, as this server leaves it."""
        [tap] = make_listeners(TrafficConfig(traffic_log="tokens", traffic_folder=str(folder)), config_for(**options))
        tap.close()
        store = TrafficStore(folder, create=False)
        since = store.index.files_since()
        store.close()
        return since

    assert start(**lineages[1]) == 0.0
    store = TrafficStore(folder)
    store.append([make_sample(9)])
    store.close()
    assert start(**lineages[1]) == 0.0
    for other in (lineages[0], lineages[2]):
        with pytest.raises(ConfigError, match="another model"):
            start(**other)
    changed = start(**lineages[1], load_format="dummy")
    assert 0.0 < changed <= time.time()
    assert start(**lineages[1], load_format="dummy") == changed
    assert start(**lineages[1]) > changed, "the files' own are others again"


def test_a_served_lineage_stands_in_the_file(tmp_path: Path, config_for: Callable[..., EngineConfig]) -> None:
    config = config_for(target_lineage="run 7")
    [tap] = make_listeners(TrafficConfig(traffic_log="tokens", traffic_folder=str(tmp_path / "t")), config)
    tap.target_changed(2, load_model(config).model)
    tap.close()
    assert target_file.read(tmp_path / "t", served_fingerprint(config_for())) is None
    assert target_file.read(tmp_path / "t", served_fingerprint(config)) is not None
