"""Models of folders with quantised weights: what they say is what the model says whose numbers these stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.loader import load_model, weights_here
from slipstream.engine.operations import BeginTargetUpdate, FillTarget, FinishTargetUpdate
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.engine.testing.logits import prompt_logits
from slipstream.engine.testing.quantised import KINDS, write_quantised
from slipstream.kernels.native.library import isa
from slipstream.kernels.native.stack import NativeCompute
from slipstream.kernels.triton import launch

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
PACKED = [name for name, kind in KINDS.items() if kind.format != "F32"]
FORMS = {KINDS[name].format: name for name in PACKED}
"""A way to quantise for each form."""
needs_native = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")


def options(model: Path, **fields: Any) -> EngineConfig:
    known = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "threads": 1, "speculation": "off"}
    return EngineConfig(model=str(model), **(known | fields))  # type: ignore[arg-type]


def said(model: Path, **fields: Any) -> list[list[int]]:
    local = LocalEngine(options(model, **fields))
    try:
        return [done.tokens for done in local.generate(PROMPTS, GREEDY)]
    finally:
        local.close()


def logits(model: Path, **fields: Any) -> torch.Tensor:
    return prompt_logits(options(model, **fields))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "qwen3_moe"])
def test_every_family_reads_them(tmp_path: Path, family: str) -> None:
    config = POLICY | {"model_type": family}
    if family == "qwen3_moe":
        config |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "norm_topk_prob": True}
    folder, numbers = write_quantised(tmp_path / "4", policy(0, config), config, KINDS["gptq-4"])
    expected = said(write_policy(tmp_path / "dense", numbers, config))
    assert said(folder) == expected and len({token for text in expected for token in text}) > 1
    assert said(folder, kernels="torch") == expected


@pytest.mark.parametrize("name", ["gptq-4-act-order", "w4a16", "fp8-blocks"])
def test_models_that_run_through_transformers_read_them_widened(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = POLICY | {"model_type": "olmo2"}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    tensors = {key: each * (10 if each.ndim == 2 else 1) for key, each in made.state_dict().items()}
    empty = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    folder, numbers = write_quantised(tmp_path / "few", tensors, config, KINDS[name], empty)
    expected = said(write_policy(tmp_path / "dense", numbers, config))
    assert said(folder) == expected and len({token for text in expected for token in text}) > 1


@needs_native
@pytest.mark.parametrize("name", KINDS)
def test_they_say_what_their_numbers_say(tmp_path: Path, name: str) -> None:
    folder, numbers = write_quantised(tmp_path / "few", policy(0), POLICY, KINDS[name])
    dense = write_policy(tmp_path / "dense", {key: each.contiguous() for key, each in numbers.items()})
    expected = logits(dense)
    assert torch.equal(logits(folder), expected), "widened at load"
    assert torch.equal(logits(folder, weights="bfloat16", dtype="auto"), logits(dense, dtype="bfloat16"))
    if name not in PACKED:
        with pytest.raises(ConfigError, match="no quantised weights that can be kept so"):
            logits(folder, weights="packed")
        return
    exact = {"weights": "packed", "packed_arithmetic": "exact"}
    assert (logits(folder, **exact) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert said(folder, **exact) == said(dense)
    for arithmetic, most in (("int16", 0.01), ("int8", 0.1)):
        found = logits(folder, weights="packed", packed_arithmetic=arithmetic)
        assert (found - expected).norm() < most * expected.norm()
    rounded = {"weights": "packed", "packed_arithmetic": "bfloat16", "dtype": "bfloat16"}
    assert torch.equal(logits(folder, **rounded), logits(folder, weights="bfloat16", dtype="auto"))


@needs_native
def test_what_is_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_quantised(tmp_path / "few", policy(0), POLICY, KINDS["awq"])
    packed = options(folder, weights="packed")
    assert weights_here(packed) == ("packed (INT4_ZERO), int16", "--weights packed")
    monkeypatch.setattr(NativeCompute, "rounds_fast", lambda: True)
    assert weights_here(replace(packed, weights="auto", dtype="auto"))[0] == "packed (INT4_ZERO), bfloat16"
    local = LocalEngine(packed)
    ready, dense = local.engine.ready(), load_model(options(folder))
    local.close()
    assert ready.weights == "packed (INT4_ZERO), int16"
    assert ready.weights_bytes < dense.weights_bytes / 3


@needs_native
@pytest.mark.parametrize("form", FORMS)
def test_updates_stay_packed_and_what_is_not_sent_keeps_its_bits(tmp_path: Path, form: str) -> None:
    folder, numbers = write_quantised(tmp_path / "few", policy(0), POLICY, KINDS[FORMS[form]])
    local = LocalEngine(options(folder, weights="packed", packed_arithmetic="exact"))
    name, other = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    sent = policy(1)[name]
    local.operate(BeginTargetUpdate(1, "recompute"), FillTarget(1, save({name: sent})))
    local.operate(FinishTargetUpdate(1, keep_rest=True))
    weights = local.engine.loaded.model.weights
    assert torch.equal(weights.read(other, 0, 64), numbers[other])
    off = (weights.read(name, 0, 64) - sent).abs().max() / sent.abs().max()
    assert 0 < off < (0.13 if "4" in form else 0.007)
    local.close()


@needs_native
def test_a_lora_is_merged_into_numbers(tmp_path: Path) -> None:
    module, generator = "base_model.model.model.layers.0.mlp.down_proj", torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 96, generator=generator), torch.randn(64, 4, generator=generator)
    matrices = save({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    folder, numbers = write_quantised(tmp_path / "few", policy(0), POLICY, KINDS["gptq-4-asymmetric"])
    found = []
    for path, fields in ((write_policy(tmp_path / "dense", numbers), {}), (folder, {"weights": "packed"})):
        local = LocalEngine(options(path, packed_arithmetic="exact" if fields else "auto", **fields))
        local.operate(BeginTargetUpdate(1, "recompute"), FillTarget(1, matrices), FinishTargetUpdate(1, lora_scale=0.5))
        found.append([done.tokens for done in local.generate(PROMPTS, GREEDY)])
        local.close()
    assert found[0] == found[1]


def test_another_way_to_quantise_is_another_model(tmp_path: Path) -> None:
    """Drafters are told apart by it, also where embedding and output matrix are the same numbers."""
    folders = [write_quantised(tmp_path / name, policy(0), POLICY, KINDS[name])[0] for name in ("gptq-4", "awq", "fp8")]
    folders.append(write_policy(tmp_path / "numbers", policy(0)))
    assert len({target_fingerprint(open_checkpoint(folder)) for folder in folders}) == len(folders)


@pytest.mark.skipif(not launch.is_interpreted(), reason="there is a GPU, or no Triton")
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_exactly(tmp_path: Path, form: str) -> None:
    pytest.importorskip("bf16_interpreter", reason="mends Triton's interpreter", exc_type=ImportError)
    folder, _ = write_quantised(tmp_path / "few", policy(0), POLICY, KINDS[FORMS[form]])
    expected, found = logits(folder), logits(folder, weights="packed", kernels="triton")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
