"""Checkpoints as people have them: other prefixes, leftovers of exporters, half-precision and mixed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine

NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
PROMPT = list(range(5, 45))
Tensors = dict[str, torch.Tensor]
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 64, 32),
    "model.layers.0.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 64, 32),
    "model.rotary_emb.original_inv_freq": torch.ones(16),
    "model.layers.1.attn.masked_bias": torch.tensor(-1e4),
    "model.layers.1.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
    "model.embeddings.position_ids": torch.arange(64)[None],
}


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        outer = prefix.removesuffix("model.")
        names = {name: prefix + name.removeprefix("model.") for name in tensors}
        names["lm_head.weight"] = outer + "lm_head.weight" if prefix.endswith("model.") else "lm_head.weight"
        return {names[name]: tensor for name, tensor in tensors.items()}

    return rename


def mixed(tensors: Tensors) -> Tensors:
    kinds = (torch.float16, torch.float32, torch.bfloat16)
    return {name: tensors[name].to(kinds[i % 3]) for i, name in enumerate(tensors)}


def text(folder: Any) -> list[int]:
    engine = LocalEngine(EngineConfig(model=str(folder), dtype="float32", kv_cache_memory="2MiB"))
    try:
        return engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.0))[0].tokens
    finally:
        engine.close()


@pytest.mark.parametrize(
    "change",
    [
        renamed("model."),
        renamed(""),
        renamed("language_model.model."),
        renamed("_orig_mod.model."),
        lambda tensors: tensors | BUFFERS,
        mixed,
    ],
    ids=["as-is", "no-prefix", "language-model", "compiled", "buffers", "mixed-types"],
)
def test_native_families_take(tiny_model: Any, change: Callable[[Tensors], Tensors]) -> None:
    model = tiny_model(TINY_LLAMA)
    file = model.folder / "model.safetensors"
    tensors = {name: tensor.bfloat16().half().float() for name, tensor in load_file(file).items()}
    model.module.load_state_dict(tensors)
    save_file(change(tensors), file)
    assert text(model.folder) == model.generate(PROMPT, 12)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("stored", ["both", "other", "alone"])
def test_ties_are_what_the_files_have(tiny_model: Any, family: str, stored: str) -> None:
    """As in transformers: the configuration says that the output matrix is the embedding, and files that have another
    one go first; where they have one of both, it is either."""
    model = tiny_model(TINY_LLAMA | {"model_type": family, "tie_word_embeddings": True, "num_hidden_layers": 1})
    file = model.folder / "model.safetensors"
    tensors = load_file(file)
    tied = tensors["model.embed_tokens.weight"]
    output = torch.nn.Parameter(torch.roll(tied, 1, 0) if stored == "other" else tied.clone())
    tensors["lm_head.weight"] = output.data
    if stored == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert open_checkpoint(model.folder).config["tie_word_embeddings"] is (stored != "other")
    model.module.lm_head.weight = output
    assert text(model.folder) == model.generate(PROMPT, 12)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1 + i / 8 for i in range(16)]},
    ],
    ids=["yarn", "twice", "llama3", "longrope"],
)
@pytest.mark.parametrize("beside", [{"original_max_position_embeddings": 16}, {}], ids=["beside", "not"])
def test_the_original_length_may_stand_beside_the_rotary_parameters(
    tiny_model: Any, rope: dict[str, Any], beside: dict[str, Any]
) -> None:
    """There it goes first in transformers; where it stands nowhere, it is the length that a file states."""
    if rope["rope_type"] == "longrope":
        rope = rope | {"long_factor": rope["short_factor"]}  # or transformers runs the model
    model = tiny_model(TINY_LLAMA | {"rope_scaling": rope} | beside)
    assert text(model.folder) == model.generate(PROMPT, 12)


def test_another_activation_is_transformers_business(tiny_model: Any) -> None:
    model = tiny_model(TINY_LLAMA | {"hidden_act": "relu"})
    assert text(model.folder) == model.generate(PROMPT, 12)


@pytest.mark.parametrize("config", [TINY_LLAMA, NEOX], ids=["native", "transformers"])
def test_what_is_no_known_buffer_is_refused_by_name(tiny_model: Any, config: dict[str, Any]) -> None:
    model = tiny_model(config)
    file = model.folder / "model.safetensors"
    tensors = load_file(file)
    root = next(iter(tensors)).split(".")[0]
    save_file(tensors | {f"{root}.layers.0.rotary_emb.inv_freq": torch.ones(4)}, file, metadata={"format": "pt"})
    assert text(model.folder) == model.generate(PROMPT, 12)
    save_file(tensors | {"model.layers.0.adapter.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.adapter\.weight"):
        text(model.folder)


@pytest.mark.parametrize("config", [TINY_LLAMA, NEOX], ids=["native", "transformers"])
def test_quantised_weights_are_refused_as_such_where_nothing_says_so(tiny_model: Any, config: dict[str, Any]) -> None:
    """Whole numbers mean nothing without scales, and scales say what their weights are."""
    model = tiny_model(config)
    file = model.folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if ".layers.0." in name and tensor.ndim == 2)
    whole = {name: (tensors[name] * 100).to(torch.int8)}
    save_file(tensors | whole, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name!r} holds whole numbers"):
        text(model.folder)
    scaled = {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(1, 1)}
    save_file(tensors | scaled, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}_scale_inv': its weights are quantised"):
        text(model.folder)
