"""Every model implementation against transformers' own, on tiny random models of real configurations."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.models import weights
from slipstream.engine.models.loader import build_model, load_model
from slipstream.engine.models.protocol import CausalModel
from slipstream.kernels.batch import make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.native import library
from slipstream.kernels.triton import launch

if launch.runs_on("cpu"):
    import bf16_interpreter  # noqa: F401  (mends the interpreter)

LLAMA = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **LLAMA},
    "llama-tied": {"model_type": "llama", **LLAMA, "tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", **LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"model_type": "llama", **LLAMA, "rope_parameters": LLAMA3_ROPE},
    "llama-yarn": {"model_type": "llama", **LLAMA, "rope_parameters": YARN},
    "mistral-window": {"model_type": "mistral", **LLAMA, "sliding_window": 40},
    "qwen2": {"model_type": "qwen2", **LLAMA},
    "qwen2-window": {
        "model_type": "qwen2",
        **LLAMA,
        "use_sliding_window": True,
        "sliding_window": 30,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **LLAMA},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        **LLAMA,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **LLAMA,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    # Sizes the compiled kernels do not take: the torch implementation serves them.
    "llama-odd": {"model_type": "llama", **LLAMA, "head_dim": 24, "intermediate_size": 90},
    # Families that run through transformers.
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    },
    "gemma2": {"model_type": "gemma2", **LLAMA, "num_hidden_layers": 2, "sliding_window": 40},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 131,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.3,
    },
}
CPU = torch.device("cpu")
NATIVE = library.load() is not None


def save(folder: Path, config: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    settings = AutoConfig.for_model(**config)
    module = AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in module.parameters():  # biases and norms too, so that none can be forgotten
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    module.save_pretrained(folder)
    return module


def load(folder: Path, kernels: str) -> CausalModel:
    options = EngineConfig(kernels=kernels)  # type: ignore[arg-type]
    return build_model(open_checkpoint(folder), options, Formats.of(torch.float32), CPU, 512)


def logits_in_steps(model: CausalModel, sequences: list[list[int]], cuts: list[int]) -> list[torch.Tensor]:
    """Logits of all positions, with every sequence cut at the same positions and the pieces batched."""
    cache = model.new_cache(64, 16)
    tables = np.arange(64, dtype=np.int32).reshape(len(sequences), -1)
    rows = np.arange(len(sequences), dtype=np.int32)
    pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
    longest = max(map(len, sequences))
    borders = [0, *cuts, longest]
    for begin, end in pairwise(borders):
        live = [row for row in rows if len(sequences[row]) > begin]
        parts = [sequences[row][begin:end] for row in live]
        counts = np.array([len(part) for part in parts], np.int32)
        ids = np.array([token for part in parts for token in part], np.int32)
        batch = make_batch(ids, counts, begin + counts, tables, np.array(live, np.int32), 16)
        logits = model.logits(model.forward(batch, cache).hidden, np.arange(len(ids), dtype=np.int32))
        # The next call may reuse the memory of these logits.
        for row, piece in zip(live, logits.clone().split(counts.tolist()), strict=True):
            pieces[row].append(piece)
    return [torch.cat(parts) for parts in pieces]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_match_transformers(tmp_path: Path, name: str, kernels: str) -> None:
    module = save(tmp_path, MODELS[name])
    model = load(tmp_path, kernels)
    if kernels == "auto" and NATIVE and MODELS[name]["model_type"] in ("llama", "mistral", "qwen2", "qwen3"):
        assert model.kernels.startswith("torch" if name == "llama-odd" else "native")
    if MODELS[name]["model_type"] in ("qwen3_moe", "gemma3_text"):
        assert model.kernels.startswith("torch"), "layers that are computed here, without compiled kernels for them"
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 131, length).tolist() for length in (200, 3, 77, 130)]
    with torch.inference_mode():
        got = logits_in_steps(model, sequences, cuts=[1, 2, 50, 51, 128])
        for sequence, logits in zip(sequences, got, strict=True):
            expected = module(torch.tensor([sequence])).logits[0]
            scale = float(expected.abs().max())
            assert (logits - expected).abs().max() < 2e-5 * scale


@pytest.mark.skipif(not launch.runs_on("cpu"), reason="Triton's kernels are not interpreted here")
@pytest.mark.parametrize("name", ["gemma3", "qwen3-moe", "gemma2"])
def test_tritons_kernels_match_transformers(tmp_path: Path, name: str) -> None:
    """Gemma 2 runs through transformers, with windows and soft caps, over the cache of GPUs."""
    small = {"sliding_window": 9, "num_hidden_layers": 2, "head_dim": 16}
    if "layer_types" in MODELS[name]:
        small["layer_types"] = ["sliding_attention", "full_attention"]
    module = save(tmp_path, MODELS[name] | small)
    model = load(tmp_path, "triton")
    assert model.kernels == ("transformers-cpu" if name == "gemma2" else "triton-cpu")
    assert type(model.new_cache(1, 16)).__name__ == "TritonKVCache"
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 131, length).tolist() for length in (18, 7)]
    with torch.inference_mode():
        got = logits_in_steps(model, sequences, cuts=[2, 12])
        for sequence, logits in zip(sequences, got, strict=True):
            expected = module(torch.tensor([sequence])).logits[0]
            assert (logits - expected).abs().max() < 2e-5 * float(expected.abs().max())


@pytest.mark.skipif(not NATIVE, reason="no native kernels on this machine")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_native_bfloat16_stays_close_to_float32(tmp_path: Path, name: str) -> None:
    save(tmp_path, MODELS[name])
    checkpoint = open_checkpoint(tmp_path)
    sequences = [np.random.default_rng(1).integers(0, 131, 150).tolist()]
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(checkpoint, EngineConfig(), Formats.of(dtype), CPU, 512)
        logits.append(logits_in_steps(model, sequences, cuts=[60, 100])[0])
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.05


def write_config(folder: Path, config: dict[str, Any]) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return EngineConfig(load_format="dummy")


def test_hybrid_models_are_refused(tmp_path: Path) -> None:
    options = write_config(
        tmp_path,
        {
            **LLAMA,
            "model_type": "jamba",
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "use_mamba_kernels": False,
        },
    )
    with pytest.raises(ModelError, match=r"paged cache|hybrid"):
        build_model(open_checkpoint(tmp_path), options, Formats.of(torch.float32), CPU, 64)


def test_unknown_model_type_names_it(tmp_path: Path) -> None:
    options = write_config(tmp_path, {"model_type": "no_such_model", "hidden_size": 8, "num_attention_heads": 2})
    with pytest.raises(ModelError, match="no_such_model"):
        build_model(open_checkpoint(tmp_path), options, Formats.of(torch.float32), CPU, 64)


def test_deterministic_mode_refuses_what_depends_on_the_batch(tmp_path: Path) -> None:
    options = write_config(tmp_path, MODELS["llama"])
    if NATIVE:
        build_model(open_checkpoint(tmp_path), replace(options, deterministic=True), Formats.of(torch.float32), CPU, 64)
    with pytest.raises(ConfigError, match="--deterministic"):
        torch_only = replace(options, deterministic=True, kernels="torch")
        build_model(open_checkpoint(tmp_path), torch_only, Formats.of(torch.float32), CPU, 64)
    write_config(tmp_path, MODELS["gpt_neox"])
    with pytest.raises(ConfigError, match="--deterministic"):
        build_model(open_checkpoint(tmp_path), replace(options, deterministic=True), Formats.of(torch.float32), CPU, 64)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, MODELS["llama"] | {"quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(ModelError, match="hqq"):
        load_model(EngineConfig(model=str(tmp_path), load_format="dummy"))


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_dummy_weights_repeat_by_seed(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, MODELS[name])
    sequence = [list(range(20))]

    def logits(seed: int) -> torch.Tensor:
        options = EngineConfig(load_format="dummy", seed=seed)
        with torch.inference_mode():
            model = build_model(open_checkpoint(tmp_path), options, Formats.of(torch.float32), CPU, 64)
            return logits_in_steps(model, sequence, cuts=[])[0]

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 tensors.*up_proj"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}), "model.norm.weight.*shape"),
        (lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(5)}), "model.layers.9.extra"),
    ],
)
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str, kernels: str) -> None:
    tensors = dict(save(tmp_path, MODELS["llama"]).state_dict())
    model = load(tmp_path, kernels)
    change(tensors)
    with pytest.raises(ModelError, match=message):
        weights.load(model, tensors.items())


def test_a_fallback_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    tensors = dict(save(tmp_path, MODELS["gpt_neox"]).state_dict())
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*dense_h_to_4h"):
        load(tmp_path, "auto")
