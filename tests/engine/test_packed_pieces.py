"""Mixtures of experts and Gemma's layers whose weights stay quantised on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.loader import load_model, weights_here
from slipstream.engine.models.weights import copy_missing
from slipstream.engine.testing.gguf import EXPERT_TYPES, write_gguf
from slipstream.engine.testing.local import LocalEngine
from slipstream.engine.testing.logits import prompt_logits
from slipstream.kernels.native.library import isa
from slipstream.kernels.native.piecewise import PiecewiseCompute

pytestmark = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3moe": SIZES
    | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"norm_topk_prob": True, "tie_word_embeddings": False},
    "gemma3": SIZES | {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "sliding_window": 16},
}
GATE, DOWN = (f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "down"))


def tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator, around = torch.Generator().manual_seed(seed), config["model_type"] != "gemma3_text"
    return {
        name: 0.15 * torch.randn(tensor.shape, generator=generator) + float(around and tensor.dim() == 1)
        for name, tensor in dummy_tensors(config, 0)
    }


@pytest.fixture(scope="module", params=list(MODELS))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MODELS[request.param]
    path = tmp_path_factory.mktemp("packed") / f"{request.param}.gguf"
    return write_gguf(path, tensors(config, 0), config, EXPERT_TYPES, arch=request.param)


def options(model: Path, **fields: Any) -> EngineConfig:
    known = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "threads": 1, "speculation": "off"}
    return EngineConfig(model=str(model), **(known | fields))  # type: ignore[arg-type]


def logits(model: Path, **fields: Any) -> Tensor:
    return prompt_logits(options(model, **fields), vocab=64)


def test_exact_is_what_dequantising_gives(file: Path) -> None:
    expected = logits(file, weights="float32")
    found = logits(file, weights="packed", packed_arithmetic="exact")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for arithmetic, most in (("int16", 1e-3), ("int8", 0.1)):
        off = (logits(file, weights="packed", packed_arithmetic=arithmetic) - expected).norm() / expected.norm()
        assert 0 < off < most, arithmetic


def test_they_are_kept_small_and_say_so(file: Path) -> None:
    packed, dense = load_model(options(file, weights="packed")), load_model(options(file))
    assert packed.weights.startswith("packed (") and packed.weights.endswith("), int16")
    assert packed.weights == weights_here(options(file, weights="packed"))[0]
    assert packed.weights_bytes < dense.weights_bytes / 3 and dense.weights == "float32"
    parts = packed.model.weights
    kept = sum(part.num_bytes for part in (parts.embedding, *parts.layers))  # type: ignore[attr-defined]
    assert kept < dense.weights_bytes / 2.5  # with norms, and the router in numbers
    with pytest.raises(ConfigError, match="torch does not compute with quantised weights"):
        load_model(options(file, weights="packed", kernels="torch"))


def test_auto_keeps_them_packed_where_that_is_faster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**fields: Any) -> tuple[str, str]:
        config = options(file, **({"dtype": "auto"} | fields))
        loaded = load_model(config)
        assert weights_here(config) == (loaded.weights, loaded.weights_because)
        return loaded.weights, loaded.model.kernels.split("-")[0]

    monkeypatch.setattr(PiecewiseCompute, "rounds_fast", lambda: True)
    for fields in ({}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}):
        form, kernels = chosen(**fields)
        assert form.startswith("packed (") and form.endswith("), bfloat16") and kernels == "native"
    assert chosen(dtype="float32") == chosen(weights="float32") == ("float32", "torch")
    assert chosen(weights="bfloat16") == ("bfloat16", "torch")
    assert chosen(kernels="torch")[1] == "torch"
    monkeypatch.setattr(PiecewiseCompute, "rounds_fast", lambda: False)
    form, kernels = chosen()
    assert form in ("bfloat16", "float32") and kernels == "torch"


def test_rounded_in_registers_they_are_weights_in_bfloat16(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums, and so for a last bit of activations here and there."""
    monkeypatch.setattr(PiecewiseCompute, "rounds_fast", lambda: True)
    rounded, dense = (load_model(options(file, weights=way, dtype="bfloat16")) for way in ("auto", "bfloat16"))
    assert rounded.weights.endswith("), bfloat16") and dense.weights == "bfloat16"
    for name, shape in dense.model.weights.shapes.items():
        found = rounded.model.weights.read(name, 0, shape[0])
        assert torch.equal(found.bfloat16(), dense.model.weights.read(name, 0, shape[0])), name
    expected = logits(file, weights="float32")
    off = [logits(file, weights=way, dtype="bfloat16") - expected for way in ("auto", "bfloat16")]
    assert off[0].norm() < 1.5 * off[1].norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("weights", "dtype"), [("packed", "float32"), ("packed", "bfloat16"), ("auto", "bfloat16")])
def test_answers_are_the_same_alone_in_a_batch_and_from_the_cache(
    file: Path, weights: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PiecewiseCompute, "rounds_fast", lambda: True)
    local = LocalEngine(options(file, weights=weights, dtype=dtype))
    assert local.engine.ready().weights.startswith("packed (")
    together = [done.tokens for done in local.generate(PROMPTS, GREEDY)]
    assert [local.generate([prompt], GREEDY)[0].tokens for prompt in PROMPTS] == together
    local.close()
    chunked = LocalEngine(options(file, weights=weights, dtype=dtype, max_step_tokens=16))
    assert [done.tokens for done in chunked.generate(PROMPTS, GREEDY)] == together
    chunked.close()


def test_updates_are_packed_again_and_the_rest_keeps_its_bits(tmp_path: Path) -> None:
    config = MODELS["qwen3moe"]
    file = write_gguf(tmp_path / "model.gguf", tensors(config, 0), config, EXPERT_TYPES, arch="qwen3moe")
    model = load_model(options(file, weights="packed")).model
    old = {name: model.weights.read(name, 0, shape[0]).float() for name, shape in model.weights.shapes.items()}
    before = [layer.num_bytes for layer in model.weights.layers]  # type: ignore[attr-defined]
    sent = {name: tensors(config, 1)[name] for name in (GATE, DOWN)}
    for exact in (False, True):
        weights = model.new_weights()
        for name, tensor in sent.items():
            weights.fill(name, tensor, 0, exact=exact)
        copy_missing(weights, model.weights)
        weights.check_complete()
        model.use(weights)
        found = {name: weights.read(name, 0, shape[0]).float() for name, shape in weights.shapes.items()}
        assert {name for name in old if not torch.equal(found[name], old[name])} == {GATE, DOWN}
        sizes = [layer.num_bytes for layer in weights.layers]  # type: ignore[attr-defined]
        assert (sizes == before) != exact
        assert torch.equal(found[DOWN], sent[DOWN]) == exact  # a matrix with a LoRA stays numbers
        assert (found[GATE] - sent[GATE]).abs().max() < 0.1


def test_experts_are_read_from_the_file_as_blocks(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    for name, kind in checkpoint.formats().items():
        if ".experts." in name and kind.startswith("Q"):
            assert checkpoint.stored(name).data.shape[0] == checkpoint.tensor_shapes()[name][0]
