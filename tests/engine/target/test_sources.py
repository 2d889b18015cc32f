"""Updates of the target from shared memory, from folders, in part, and as a LoRA; and checksums of what serves."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    ChecksumTarget,
    FillTarget,
    FillTargetHandles,
    FillTargetShared,
    FinishTargetUpdate,
    ReadTarget,
    ReadTensor,
)
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.engine.testing.lora import random_lora, write_lora

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20))]
Tensors = dict[str, Tensor]


def engine(folder: Path, **fields: Any) -> LocalEngine:
    options: dict[str, Any] = {
        "kv_cache_memory": "4MiB",
        "max_running": 8,
        "dtype": "float32",
        "pipeline": "off",
        "threads": 1,
    }
    return LocalEngine(EngineConfig(model=str(folder), **(options | fields)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policies") / "0", policy(0))


@pytest.fixture(scope="module", params=["native", "torch"])
def local(folder: Path, request: pytest.FixtureRequest) -> Iterator[LocalEngine]:
    """One for all: each test sends whole weights first, or compares with what serves."""
    local = engine(folder, kernels=request.param)
    yield local
    local.close()


def digests(tensors: Tensors) -> dict[str, str]:
    """What a trainer says of its weights."""
    return {name: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def serving(local: LocalEngine) -> dict[str, str]:
    found: dict[str, str] = local.operate(ChecksumTarget()).by_name
    return found


def update(local: LocalEngine, *fills: Any, **finish: Any) -> None:
    local.operate(BeginTargetUpdate(1), *fills, FinishTargetUpdate(1, **finish))


def test_checksums_are_those_of_the_trainers_tensors(local: LocalEngine) -> None:
    update(local, FillTarget(1, save(policy(3))), checksums=digests(policy(3)))
    assert serving(local) == digests(policy(3))
    wrong = digests(policy(3)) | {"model.norm.weight": digests(policy(4))["model.layers.0.mlp.up_proj.weight"]}
    with pytest.raises(ModelError, match=r"1 tensors are not those .* model.norm.weight"):
        update(local, FillTarget(1, save(policy(3))), checksums=wrong)
    with pytest.raises(ModelError, match=r"for example model\.nose"):
        update(local, FillTarget(1, save(policy(3))), checksums={"model.nose": ""})


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from(sorted(policy(0)))), st.randoms(use_true_random=False))
def test_what_an_update_leaves_out_stays(local: LocalEngine, names: set[str], rng: Any) -> None:
    """Whole tensors, or some of their rows."""
    update(local, FillTarget(1, save(policy(1))))
    sent, firsts, expected = {}, {}, dict(policy(1))
    for name in names:
        whole = policy(2)[name]
        first = rng.randrange(len(whole))
        last = rng.randrange(first, len(whole)) + 1
        sent[name], firsts[name] = whole[first:last].clone(), first
        expected[name] = torch.cat((expected[name][:first], sent[name], expected[name][last:]))
    fills = [FillTarget(1, save(sent), firsts)] if sent else []
    update(local, *fills, keep_rest=True)
    assert serving(local) == digests(expected)


def test_fills_tell_how_many_tensors_are_missing(local: LocalEngine) -> None:
    tensors = policy(0)
    local.operate(BeginTargetUpdate(1))
    for left, (name, tensor) in enumerate(reversed(tensors.items())):
        assert local.operate(FillTarget(1, save({name: tensor}))) == len(tensors) - left - 1


def test_tensors_are_read_by_name(local: LocalEngine) -> None:
    update(local, FillTarget(1, save(policy(5))))
    for name, tensor in policy(5).items():
        first = len(tensor) // 3
        found = local.operate(ReadTensor(name, first, 7))
        assert found.shape == tuple(tensor.shape)
        rows = np.frombuffer(found.values, np.float32).reshape(-1, *tensor.shape[1:])
        assert np.array_equal(rows, tensor[first : first + 7].float().numpy()), name
    for wrong, words in ((ReadTensor("no"), "no tensor 'no'"), (ReadTensor(name, 10**6), "rows, none of which")):
        with pytest.raises(ModelError, match=words):
            local.operate(wrong)


# Shared memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    data = save(policy(6))
    segment = SharedMemory(create=True, size=len(data) + 100)
    segment.buf[: len(data)] = data
    yield segment
    segment.close()
    segment.unlink()


def test_weights_lie_in_shared_memory(local: LocalEngine, segment: SharedMemory) -> None:
    size = len(save(policy(6)))
    local.operate(BeginTargetUpdate(1))
    assert local.operate(FillTargetShared(1, segment.name, size)) == 0
    segment.buf[:size] = bytes(size)  # it may be used again at once
    local.operate(FinishTargetUpdate(1))
    assert serving(local) == digests(policy(6))


def test_what_is_no_segment_of_ours_is_refused(local: LocalEngine, segment: SharedMemory, tmp_path: Path) -> None:
    link = Path("/dev/shm") / (segment.name + "-link")
    link.symlink_to(tmp_path / "elsewhere")
    before = serving(local)
    try:
        for name, size, words in (
            ("../../etc/passwd", 10, "no name"),
            ("a/b", 10, "no name"),
            ("", 10, "no name"),
            (".", 10, "no shared-memory segment"),
            ("not-there-at-all", 10, "cannot be opened: No such file"),
            (link.name, 10, "it is a link"),
            (segment.name, segment.size + 10**6, "bytes, not"),
            (segment.name, 0, "bytes, not 0"),
            (segment.name, 50, "no safetensors file"),
        ):
            with pytest.raises(ModelError, match=words):
                update(local, FillTargetShared(1, name, size))
    finally:
        link.unlink()
    assert serving(local) == before


def pickled(value: Any) -> bytes:
    """As trainers pickle what they share with torch's strategy of files."""
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing as multiprocessing

    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        return bytes(ForkingPickler.dumps(value))
    finally:
        multiprocessing.set_sharing_strategy(before)


class FlattenedTensorMetadata:
    def __init__(self, name: str, shape: torch.Size, dtype: torch.dtype, start: int, end: int) -> None:
        self.name, self.shape, self.dtype, self.start_idx, self.end_idx = name, shape, dtype, start, end


def flattened(tensors: Tensors) -> dict[str, Any]:
    parts, metadata, begin = [], [], 0
    for name, tensor in tensors.items():
        parts.append(tensor.contiguous().view(-1).view(torch.uint8))
        end = begin + len(parts[-1])
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, begin, end))
        begin = end
    return {"flattened_tensor": torch.cat(parts), "metadata": metadata}


class LocalSerializedTensor:
    """As SGLang has one, for each device that a server may have."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)


@pytest.mark.parametrize("way", ["pairs", "flattened", "by device"])
def test_tensors_are_shared_as_handles(local: LocalEngine, way: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in policy(7).items()}
    value: Any = flattened(tensors) if way == "flattened" else list(tensors.items())
    if way == "by device":
        value = [(name, LocalSerializedTensor(pickled(tensor))) for name, tensor in value]
    update(local, FillTargetHandles(1, pickled(value)))
    assert serving(local) == digests(policy(7))


@pytest.mark.parametrize("uuid", ["8a1c-22", "GPU-8a1c-22"])
def test_a_gpu_is_known_by_its_id_as_torch_and_as_nvml_write_it(
    local: LocalEngine, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="8a1c-22"))
    tensors = policy(7)
    value = [{uuid: tensor.clone()} for tensor in tensors.values()]
    update(local, FillTargetHandles(1, pickled(value), tuple(tensors)))
    assert serving(local) == digests(policy(7))
    with pytest.raises(ModelError, match="lies on the GPUs 9b, not on 8a1c-22"):
        update(local, FillTargetHandles(1, pickled([{"GPU-9b": torch.ones(2)}]), ("a",)))


class _Harmful:
    def __reduce__(self) -> Any:
        return print, ("harm is done",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pickle.dumps(_Harmful()), "builtins.print, which is not loaded"),
        (pickle.dumps([("a", torch.nn.Linear)]), "not loaded"),
        (pickle.dumps([("a", 1)]), "no tensor"),
        (pickle.dumps([1]), "no pairs"),
        (pickle.dumps(7), "no list"),
        (b"\x80\x04nothing", "cannot be read"),
        (pickle.dumps({"flattened_tensor": 1, "metadata": []}), "flattened bucket"),
        (pickle.dumps([("a", LocalSerializedTensor(b"", b""))]), "'a' is not shared once"),
        (pickle.dumps([("a", LocalSerializedTensor(pickle.dumps(_Harmful())))]), "builtins.print, which is not loaded"),
        (pickle.dumps([("a", LocalSerializedTensor(pickle.dumps(1)))]), "no tensor"),
    ],
    ids=range(10),
)
def test_a_pickle_can_do_nothing(local: LocalEngine, capsys: Any, data: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        update(local, FillTargetHandles(1, data))
    assert "harm" not in capsys.readouterr().out


# Folders and LoRAs ---------------------------------------------------------------------------------------------------


def test_a_folder_of_shards_needs_no_configuration(local: LocalEngine, tmp_path: Path) -> None:
    tensors = list(policy(8).items())
    shards = {"a.safetensors": dict(tensors[:7]), "b.safetensors": dict(tensors[7:])}
    for file, some in shards.items():
        save_file(some, tmp_path / file)
    index = {"weight_map": {name: file for file, some in shards.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    update(local, ReadTarget(1, str(tmp_path)))
    assert serving(local) == digests(policy(8))


LORA = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj")


def lora(seed: int, rank: int = 4) -> Tensors:
    shapes = {f"{module}.weight": policy(0)[f"{module}.weight"].shape for module in LORA}
    return random_lora(shapes, rank, seed, size=1.0)


def merged(base: Tensors, matrices: Tensors, scale: float) -> Tensors:
    found = {name: tensor.float() for name, tensor in base.items()}
    for module in LORA:
        up, down = (matrices[f"base_model.model.{module}.lora_{which}.weight"] for which in "BA")
        found[f"{module}.weight"] = found[f"{module}.weight"] + scale * (up @ down)
    return found


def close(local: LocalEngine, expected: Tensors) -> None:
    for name, tensor in expected.items():
        found = np.frombuffer(local.operate(ReadTensor(name, 0, len(tensor))).values, np.float32)
        assert np.allclose(found.reshape(tensor.shape), tensor.float().numpy(), rtol=1e-5, atol=1e-5), name


def test_a_lora_is_added_to_what_served_before_any_lora(local: LocalEngine, tmp_path: Path) -> None:
    update(local, FillTarget(1, save(policy(0))))
    update(local, FillTarget(1, save(lora(1))), lora_scale=0.5)
    close(local, merged(policy(0), lora(1), 0.5))
    write_lora(tmp_path, lora(2), scale=2.0)
    update(local, ReadTarget(1, str(tmp_path)))
    close(local, merged(policy(0), lora(2), 2.0))
    update(local, FillTarget(1, save(policy(1))))
    update(local, FillTarget(1, save(lora(3))), lora_scale=1.0)
    close(local, merged(policy(1), lora(3), 1.0))


def renamed(matrices: Tensors, **changes: Tensor) -> Tensors:
    return matrices | {name.replace("__", "."): tensor for name, tensor in changes.items()}


BROKEN_LORAS: dict[str, tuple[Tensors, float | None, str]] = {
    "no scale": (lora(1), None, "nobody has told"),
    "half of it": ({name: tensor for name, tensor in lora(1).items() if "lora_A" in name}, 1.0, "only the matrix A"),
    "no such weight": (
        {"model.nose.lora_A.weight": torch.ones(1, 2), "model.nose.lora_B.weight": torch.ones(2, 1)},
        1.0,
        "no weight of this model",
    ),
    "a wrong size": (
        {f"{LORA[0]}.lora_A.weight": torch.ones(1, 3), f"{LORA[0]}.lora_B.weight": torch.ones(2, 1)},
        1.0,
        r"shapes \[2, 1\] times \[1, 3\]",
    ),
    "ranks differ": (
        {f"{LORA[0]}.lora_A.weight": torch.ones(3, 64), f"{LORA[0]}.lora_B.weight": torch.ones(64, 2)},
        1.0,
        "times",
    ),
    "no matrix": ({f"{LORA[0]}.lora_A.weight": torch.ones(3)}, 1.0, "no matrix of a LoRA"),
    "DoRA": ({f"{LORA[0]}.lora_magnitude_vector.weight": torch.ones(3)}, 1.0, "not supported"),
}


@pytest.mark.parametrize("broken", BROKEN_LORAS.values(), ids=BROKEN_LORAS)
def test_a_lora_that_does_not_fit_is_refused(local: LocalEngine, broken: tuple[Tensors, float | None, str]) -> None:
    matrices, scale, words = broken
    before = serving(local)
    with pytest.raises(ModelError, match=words):
        update(local, FillTarget(1, save(matrices)), lora_scale=scale)
    assert serving(local) == before


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"r": 0},
        {"lora_alpha": None},
        {"rank_pattern": {"q": 2}},
        {"init_lora_weights": "corda"},
        {"peft_type": "LOHA"},
    ],
)
def test_a_lora_of_another_kind_is_refused(local: LocalEngine, tmp_path: Path, change: dict[str, Any]) -> None:
    write_lora(tmp_path, lora(1), **change)
    with pytest.raises(ModelError, match=r"not supported|no usable|does not go with|LORA is supported alone"):
        update(local, ReadTarget(1, str(tmp_path)))


def test_paths_where_the_system_cannot_look_are_refused(local: LocalEngine, tmp_path: Path) -> None:
    before = serving(local)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("a" * 256, "a/" * 3000, str(tmp_path / "loop" / "x"), "a\0b"):
        with pytest.raises(ModelError, match=r"cannot look for adapter_config\.json|there is no model") as told:
            update(local, ReadTarget(1, path))
        assert len(str(told.value)) < 600
    assert serving(local) == before


def test_weights_of_another_format_have_its_checksums(folder: Path) -> None:
    local = engine(folder, dtype="bfloat16")
    expected = {
        name: hashlib.sha256(tensor.bfloat16().view(torch.int16).numpy().tobytes()).hexdigest()
        for name, tensor in policy(0).items()
    }
    assert serving(local) == expected
    assert POLICY["vocab_size"] == len(policy(0)["lm_head.weight"])
    local.close()
