"""Engines whose weights stay quantised: what they compute, what they say of it, and what updates make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models import weight_formats
from slipstream.engine.models.loader import load_model, weights_here
from slipstream.engine.operations import BeginTargetUpdate, FillTarget, FinishTargetUpdate, ReleaseMemory, ResumeMemory
from slipstream.engine.testing.gguf import PACKED_TYPES, write_gguf
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.engine.testing.logits import prompt_logits
from slipstream.kernels.native.library import isa
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.triton import launch

pytestmark = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("packed") / "policy.gguf", policy(0), POLICY)


def options(model: Path, **fields: Any) -> EngineConfig:
    known = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "threads": 1, "speculation": "off"}
    return EngineConfig(model=str(model), **(known | fields))  # type: ignore[arg-type]


def logits(model: Path, **fields: Any) -> torch.Tensor:
    return prompt_logits(options(model, **fields))


def said(local: LocalEngine) -> list[list[int]]:
    return [done.tokens for done in local.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("kind", ["mixed", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_exact_is_what_dequantising_gives(tmp_path: Path, file: Path, kind: str) -> None:
    if kind != "mixed":
        file = write_gguf(tmp_path / "one.gguf", policy(0), POLICY, dict.fromkeys(PACKED_TYPES, kind))
    expected = logits(file, weights="float32")
    scale = expected.abs().max()
    assert (logits(file, weights="packed", packed_arithmetic="exact") - expected).abs().max() < 1e-4 * scale
    int8 = logits(file, weights="packed", packed_arithmetic="int8")
    assert 0 < (int8 - expected).norm() / expected.norm() < 0.1


@pytest.mark.skipif(not launch.is_interpreted(), reason="there is a GPU, or no Triton")
def test_a_gpu_computes_exactly(file: Path) -> None:
    pytest.importorskip("bf16_interpreter", reason="mends Triton's interpreter", exc_type=ImportError)
    expected, found = logits(file, weights="float32"), logits(file, weights="packed", kernels="triton")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    config = options(file, weights="packed", kernels="triton")
    form, because = weights_here(config)
    assert form.endswith("), exact") and because == "--weights packed"
    assert load_model(config).weights_bytes < load_model(options(file, weights="float32")).weights_bytes / 3
    with pytest.raises(ConfigError, match="--packed-arithmetic int8: a GPU computes exactly"):
        weights_here(options(file, weights="packed", kernels="triton", packed_arithmetic="int8"))


def test_an_engine_tells_how_weights_are_kept_and_what_they_take(file: Path, tmp_path: Path) -> None:
    packed = LocalEngine(options(file, weights="packed", packed_arithmetic="int8"))
    dense = LocalEngine(options(file, weights="float32"))
    ready = packed.engine.ready()
    assert ready.weights.startswith("packed (Q4_0, ") and ready.weights.endswith("), int8") and ready.dtype == "float32"
    assert all(kind in ready.weights for kind in PACKED_TYPES.values())
    assert dense.engine.ready().weights == "float32"
    assert ready.weights_bytes < dense.engine.ready().weights_bytes / 3
    packed.close()
    dense.close()


def test_it_is_said_why_weights_are_kept_so(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(model: Path, **fields: Any) -> tuple[str, str]:
        config = options(model, **({"dtype": "auto"} | fields))
        loaded = load_model(config)
        assert weights_here(config) == (loaded.weights, loaded.weights_because)
        return loaded.weights, loaded.weights_because

    form, because = chosen(file, weights="packed")
    assert form.startswith("packed (") and form.endswith(f"), {weight_formats.ARITHMETIC}")
    assert because == "--weights packed"
    assert chosen(file, weights="bfloat16") == ("bfloat16", "--weights bfloat16")
    monkeypatch.setattr(NativeCompute, "rounds_fast", lambda: False)
    assert "--weights packed reads less" in chosen(file)[1]
    assert chosen(file, packed_arithmetic="int8")[1] == "--packed-arithmetic int8"
    monkeypatch.setattr(NativeCompute, "rounds_fast", lambda: True)
    form, because = chosen(file)
    assert form.startswith("packed (") and form.endswith("), bfloat16") and "read faster" in because
    assert chosen(file, dtype="float32") == (
        "float32",
        "the number format of --dtype; --weights packed reads less per step",
    )
    numbers = write_policy(tmp_path / "0", policy(0))
    for found in (chosen(file, kernels="torch"), chosen(numbers)):
        assert found[1] == "the number format of --dtype"


def test_rounded_in_registers_they_are_weights_in_bfloat16_to_the_bit_also_after_updates(file: Path) -> None:
    sent = {name: tensor for name, tensor in policy(1).items() if "q_proj" in name or "down" in name or "1.mlp" in name}
    ways = ({"weights": "bfloat16"}, {"weights": "packed", "packed_arithmetic": "bfloat16"})
    engines = [LocalEngine(options(file, dtype="bfloat16", **way)) for way in ways]
    logprobs = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3)

    def told(local: LocalEngine) -> list[Any]:
        return [[delta.logprobs for delta in done.deltas] for done in local.generate(PROMPTS, logprobs)]

    for version in (0, 1, 2):
        if version:
            parts = sent if version == 1 else policy(2)  # some of a fused matrix, then all of them
            for local in engines:
                local.operate(BeginTargetUpdate(version, "recompute"), FillTarget(version, save(parts)))
                local.operate(FinishTargetUpdate(version, keep_rest=version == 1))
        dense, rounded = map(told, engines)
        assert dense == rounded, f"version {version}"
    for local in engines:
        local.close()


@pytest.mark.parametrize("arithmetic", ["exact", "int16", "int8"])
def test_a_lora_is_added_to_packed_weights(file: Path, arithmetic: str) -> None:
    module, generator = "base_model.model.model.layers.0.mlp.down_proj", torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 96, generator=generator), torch.randn(64, 4, generator=generator)
    matrices = save({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    found = []
    for fields in ({"weights": "float32"}, {"weights": "packed", "packed_arithmetic": arithmetic}):
        local = LocalEngine(options(file, **fields))
        before = said(local)
        local.operate(BeginTargetUpdate(1, "recompute"), FillTarget(1, matrices), FinishTargetUpdate(1, lora_scale=0.5))
        found.append(said(local))
        assert found[-1] != before
        local.close()
    assert found[0] == found[1], "what was merged is computed with in numbers"


def test_an_engine_that_slept_has_its_packed_weights_again(file: Path) -> None:
    local = LocalEngine(options(file, weights="packed"))
    before = said(local)
    local.operate(ReleaseMemory(("weights", "kv_cache"), keep_weights=False))
    local.operate(ResumeMemory(("weights", "kv_cache")))
    assert said(local) == before
    assert local.engine.ready().weights.startswith("packed")
    local.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernels": "torch"}, "torch does not compute with quantised weights"),
        ({"load_format": "dummy"}, "no quantised weights"),
        ({"weights": "bfloat16"}, "--dtype float32"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(file: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(options(file, **({"weights": "packed"} | fields)))


def test_a_model_of_numbers_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no quantised weights"):
        load_model(options(write_policy(tmp_path / "0", policy(0)), weights="packed"))


def test_the_format_of_weights_is_that_of_the_model(file: Path) -> None:
    for weights, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert load_model(options(file, weights=weights, dtype="auto")).model.formats.compute is dtype
