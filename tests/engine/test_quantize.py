"""Weights that are quantised when they come as numbers (--quantize): at the start, in updates, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.decoder import DecoderWeights
from slipstream.engine.models.loader import load_model, weights_here
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.operations import (
    BeginTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    Operation,
    ReadTensor,
    ReleaseMemory,
    ResumeMemory,
)
from slipstream.engine.testing.gguf import PACKED_TYPES, write_gguf
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.kernels.native.library import isa
from slipstream.kernels.native.quantised import StoredWeight
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.stored import Quantize
from slipstream.kernels.triton import launch

pytestmark = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0."
Q, V, DOWN = f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.v_proj.weight", f"{LAYER}mlp.down_proj.weight"
ON_TRITON = pytest.mark.skipif(not launch.is_interpreted(), reason="there is a GPU, or no Triton")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("quantize") / "0", policy(0))


@pytest.fixture(params=["native", pytest.param("triton", marks=ON_TRITON)])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("bf16_interpreter", reason="mends Triton's interpreter", exc_type=ImportError)
    yield request.param


def options(model: Path, **fields: Any) -> EngineConfig:
    known = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "threads": 1, "speculation": "off"}
    return EngineConfig(model=str(model), **(known | fields))  # type: ignore[arg-type]


def said(local: LocalEngine) -> list[list[int]]:
    return [done.tokens for done in local.generate(PROMPTS, GREEDY)]


def served(local: LocalEngine) -> dict[str, Tensor]:
    found = {}
    for name in policy(0):
        rows = local.operate(ReadTensor(name, rows=10_000))
        found[name] = torch.from_numpy(np.frombuffer(rows.values, np.float32).copy()).view(rows.shape)
    return found


def update(version: int, tensors: dict[str, Tensor], **finish: Any) -> list[Operation[Any]]:
    parts = BeginTargetUpdate(version, "recompute"), FillTarget(version, save(tensors))
    return [*parts, FinishTargetUpdate(version, **finish)]


def expected(quantize: Quantize, name: str, numbers: Tensor) -> Tensor:
    """What becomes of a tensor."""
    if numbers.dim() == 1:
        return numbers
    in_eight = name in (EMBEDDING, OUTPUT) or any(part in name for part in ("v_proj", "down_proj"))
    kind = "Q8_0" if quantize == "q8" or in_eight else "Q4_1"
    weight = StoredWeight(*numbers.shape, torch.float32, numbers_as=(kind,))
    weight.fill(numbers)
    assert weight.is_quantised
    return weight.rows(torch.arange(len(numbers)))


def sizes(model: CausalModel) -> int:
    weights = model.weights
    assert isinstance(weights, DecoderWeights)
    parts = {id(part): part for part in (weights.embedding, weights.output, *weights.layers)}
    return sum(part.num_bytes for part in parts.values())


@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_numbers_become_blocks_when_they_are_loaded_and_what_that_takes_is_told(
    folder: Path, kernels: str, quantize: Quantize
) -> None:
    config = options(folder, quantize=quantize, kernels=kernels)
    local, dense = LocalEngine(config), load_model(options(folder))
    ready, loaded = local.engine.ready(), local.engine.loaded
    names = {"q8": "packed (q8), ", "q4": "packed (q4, q8), "}
    assert ready.weights == names[quantize] + ("int16" if kernels == "native" else "exact")
    assert weights_here(config) == (ready.weights, f"--quantize {quantize}") == (ready.weights, ready.weights_because)
    assert loaded.weights_bytes == loaded.update_bytes < dense.weights_bytes * 0.4
    assert 0.85 * loaded.weights_bytes < sizes(loaded.model) <= loaded.weights_bytes
    for name, tensor in served(local).items():
        # Another order of sums may make another scale of four bits.
        assert torch.allclose(tensor, expected(quantize, name, policy(0)[name]), rtol=0, atol=1e-6), name
    assert said(local)
    local.close()


def test_files_of_other_numbers_give_the_same(folder: Path, tmp_path: Path) -> None:
    """Files of GGUF, and of all formats that have these numbers."""
    tensors = {name: tensor.half().float() for name, tensor in policy(0).items()}
    halves = write_policy(tmp_path / "half", {name: tensor.half() for name, tensor in tensors.items()})
    whole = write_policy(tmp_path / "float", tensors)
    gguf = write_gguf(tmp_path / "policy.gguf", tensors, POLICY, {})
    found = []
    for model in (halves, whole, gguf):
        local = LocalEngine(options(model, quantize="q4"))
        found.append((served(local), said(local)))
        local.close()
    for tensors, answers in found[1:]:
        assert all(torch.equal(tensor, found[0][0][name]) for name, tensor in tensors.items())
        assert answers == found[0][1]


def test_what_a_file_has_quantised_stays_beside_numbers_that_become_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "policy.gguf", policy(0), POLICY, {"ffn_down": "Q5_1", "token_embd": "Q8_0"})
    loaded = load_model(options(file, quantize="q4"))
    assert loaded.weights.startswith("packed (q4, ") and "Q5_1" in loaded.weights and "q8" in loaded.weights
    assert torch.equal(loaded.model.weights.read(Q, 0, 64), expected("q4", Q, policy(0)[Q]))


@pytest.mark.parametrize("arithmetic", ["exact", "bfloat16", "int16", "int8"])
def test_updates_are_packed_in_the_same_forms_in_any_arithmetic(folder: Path, arithmetic: str) -> None:
    local = LocalEngine(options(folder, quantize="q4", packed_arithmetic=arithmetic, dtype="bfloat16"))
    check_updates(local)


def test_updates_on_a_gpu_are_packed_too(folder: Path, kernels: str) -> None:
    check_updates(LocalEngine(options(folder, quantize="q4", kernels=kernels)))


def check_updates(local: LocalEngine) -> None:
    before, size, trained = served(local), sizes(local.engine.loaded.model), policy(1)
    tolerance = {"rtol": 0, "atol": 1e-6 if local.engine.ready().dtype == "float32" else 2e-3}
    local.operate(*update(1, {name: trained[name] for name in (Q, V, DOWN)}, keep_rest=True))
    after = served(local)
    for name, tensor in after.items():
        if name in (Q, V, DOWN):
            assert torch.allclose(tensor, expected("q4", name, trained[name]), **tolerance), name
        else:
            assert torch.equal(tensor, before[name]), "what was not sent keeps its bits"
    local.operate(*update(2, trained))
    for name, tensor in served(local).items():
        assert torch.allclose(tensor, expected("q4", name, trained[name]), **tolerance), name
    assert sizes(local.engine.loaded.model) == size
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in served(local).items()), "as the files again"
    assert sizes(local.engine.loaded.model) == size
    local.close()


def test_a_matrix_that_a_lora_is_merged_into_is_kept_as_numbers(folder: Path, kernels: str) -> None:
    local = LocalEngine(options(folder, quantize="q4", kernels=kernels))
    before, generator = served(local), torch.Generator().manual_seed(0)
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    down, up = torch.randn(4, 64, generator=generator), 1e-4 * torch.randn(64, 4, generator=generator)
    matrices = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    local.operate(*update(1, matrices, lora_scale=0.5))
    after = served(local)
    assert torch.allclose(after[Q], before[Q] + 0.5 * up @ down, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name != Q)
    local.close()


def test_random_weights_are_quantised_too(folder: Path) -> None:
    dense = load_model(options(folder, load_format="dummy"))
    loaded = load_model(options(folder, load_format="dummy", quantize="q8"))
    assert loaded.weights == "packed (q8), int16" and loaded.weights_bytes < dense.weights_bytes * 0.4
    assert 0.85 * loaded.weights_bytes < sizes(loaded.model) <= loaded.weights_bytes


def test_the_arithmetic_is_that_of_blocks_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**fields: Any) -> str:
        return load_model(options(folder, quantize="q8", **({"dtype": "bfloat16"} | fields))).weights

    for rounds, found in ((True, "bfloat16"), (False, "int16")):
        monkeypatch.setattr(NativeCompute, "rounds_fast", lambda rounds=rounds: rounds)
        assert chosen() == f"packed (q8), {found}"
        assert chosen(weights="packed") == chosen(dtype="float32") == "packed (q8), int16"
        assert chosen(packed_arithmetic="int8") == "packed (q8), int8"


def test_rows_that_are_no_whole_blocks_stay_numbers_and_that_is_said(tmp_path: Path) -> None:
    tensors = policy(0)
    for name in [name for name in tensors if ".mlp." in name]:
        tensors[name] = (tensors[name][:, :48] if "down_proj" in name else tensors[name][:48]).contiguous()
    folder = write_policy(tmp_path / "odd", tensors, POLICY | {"intermediate_size": 48})
    loaded = load_model(options(folder, quantize="q8"))
    several = len([name for name in tensors if "down_proj" in name])
    assert loaded.weights_because.startswith(f"--quantize q8; {several} matri")
    assert "no multiples of 32 numbers: float32" in loaded.weights_because
    assert torch.equal(loaded.model.weights.read(DOWN, 0, 64), tensors[DOWN])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "bfloat16", "dtype": "auto"}, "--quantize q8: does not go with --weights bfloat16"),
        ({"kernels": "torch"}, "--quantize q8: torch does not compute with quantised weights; use --kernels auto"),
        ({"packed_arithmetic": "bfloat16"}, "--packed-arithmetic bfloat16: does not go with --dtype float32"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(options(folder, **({"quantize": "q8"} | fields)))


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "policy.gguf", policy(0), POLICY, PACKED_TYPES | {"output": "Q8_0"})
    with pytest.raises(
        ConfigError, match=r"its weights are quantised already \(.*Q4_1.*\), which --weights packed leaves"
    ):
        load_model(options(file, quantize="q4"))
