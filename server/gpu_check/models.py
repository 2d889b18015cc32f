"""Models without weights of their own: the sizes of known ones, and small ones that say something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from slipstream.engine.checkpoint.dummy import INIT_STD, dummy_tensors
from slipstream.engine.checkpoint.shapes import parameter_shapes
from slipstream.engine.testing.local import TINY_LLAMA
from slipstream.server.gpu_check.context import Context


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, size: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": 32768,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "architectures": ["LlamaForCausalLM"],
        **fields,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "135M": _llama(30, 576, 1536, 9, 3, 64, vocab_size=49152, tie_word_embeddings=True),
    "1B": _llama(16, 2048, 8192, 32, 8, 64, tie_word_embeddings=True),
    "8B": _llama(32, 4096, 14336, 32, 8, 128),
    "32B": _llama(
        64, 5120, 25600, 64, 8, 128, vocab_size=151936, model_type="qwen3", architectures=["Qwen3ForCausalLM"]
    ),
}
"""config.json by the sizes that models have: SmolLM2, Llama 3.2 and 3.1, Qwen3."""
TINY = TINY_LLAMA | {"max_position_embeddings": 512, "architectures": ["LlamaForCausalLM"]}


def shape(context: Context, name: str) -> dict[str, Any]:
    """A tiny one instead in a dry run."""
    tied = {"tie_word_embeddings": SHAPES[name].get("tie_word_embeddings", False)}
    return TINY | tied if context.dry_run else SHAPES[name]


def weights_bytes(config: dict[str, Any], itemsize: int) -> int:
    """The weights that a step reads: all but the rows of the embedding, where these are not the output matrix, too."""
    sizes = {name: size[0] * (size[1] if len(size) > 1 else 1) for name, size in parameter_shapes(config)}
    if not config.get("tie_word_embeddings"):
        del sizes["model.embed_tokens.weight"]
    return sum(sizes.values()) * itemsize


def kv_bytes(config: dict[str, Any], itemsize: int) -> int:
    """What one token takes in the cache."""
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * itemsize)


def folder(context: Context, name: str, config: dict[str, Any]) -> Path:
    """With a configuration alone."""
    path = context.scratch / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def lively(context: Context, name: str, config: dict[str, Any]) -> Path:
    """With weights that are so large that what it says depends on everything before."""
    return with_weights(context, name, config, 1.28 / (INIT_STD * config["hidden_size"] ** 0.5))


def with_weights(context: Context, name: str, config: dict[str, Any], factor: float) -> Path:
    """With matrices so many times those of a dummy, which with tied embeddings repeats the last token."""
    path = folder(context, name, config)
    tensors = {each: tensor * factor if tensor.ndim == 2 else tensor for each, tensor in dummy_tensors(config, 0)}
    save_file(tensors, path / "model.safetensors")
    return path
