"""Parameter names and shapes of the decoder families that are served natively, in Hugging Face naming."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from slipstream.engine.errors import ModelError

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")
LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
TIED = ("gemma3_text",)
"""Families whose output matrix is the embedding where a configuration says nothing."""


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's own names by those of a file whose exporter wrote the decoder under another prefix.

    A decoder saved alone lacks ``model.``, one taken out of a larger model or out of a training program has something
    before it (``language_model.model.``, ``_orig_mod.model.``).
    """
    found = list(names)
    decoder = decoder_prefix(found)
    if decoder is None:
        return {}
    outer = decoder.removesuffix("model.")
    return {
        name: "model." + name.removeprefix(decoder)
        if name.startswith(decoder) and not _is_head(name)
        else name.removeprefix(outer)
        for name in found
    }


def decoder_prefix(names: Iterable[str]) -> str | None:
    """What the names of a decoder's tensors begin with in a file; None where it cannot be told."""
    embeddings = [name for name in names if name == EMBEDDING or name.endswith("." + EMBEDDING)]
    return embeddings[0].removesuffix(EMBEDDING) if len(embeddings) == 1 else None


def of_decoder(names: Iterable[str]) -> list[str]:
    """Those names of a file that are a decoder's or its output matrix's, and not of what sees beside it."""
    found = list(names)
    decoder = decoder_prefix(found)
    return found if decoder is None else [name for name in found if name.startswith(decoder) or _is_head(name)]


def _is_head(name: str) -> bool:
    return name == HEAD or name.endswith("." + HEAD)


def positive_int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"the model configuration has {key} = {value!r}, a positive whole number is needed")
    return value


def head_dim(config: dict[str, Any]) -> int:
    heads = positive_int(config, "num_attention_heads")
    return positive_int(config, "head_dim", default=positive_int(config, "hidden_size") // heads)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output matrix is the embedding."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED))


def num_experts(config: dict[str, Any]) -> int:
    """Both spellings; newer versions of transformers write the second."""
    return positive_int(config, "num_experts", default=config.get("num_local_experts"))


def parameter_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of a model with this Hugging Face configuration; linear weights are [out, in]."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(
            f"parameter shapes are known for the model types {', '.join(FAMILIES)}, not for {family!r}; "
            "load this model from its weights (without --load-format dummy)"
        )
    hidden = positive_int(config, "hidden_size")
    inner = positive_int(config, "intermediate_size")
    vocab = positive_int(config, "vocab_size")
    heads = positive_int(config, "num_attention_heads")
    size = head_dim(config)
    queries = heads * size
    keys = positive_int(config, "num_key_value_heads", default=heads) * size
    biased = family not in ("mistral", "qwen2") and bool(config.get("attention_bias"))
    linears = {
        "self_attn.q_proj": (queries, hidden, biased or family == "qwen2"),
        "self_attn.k_proj": (keys, hidden, biased or family == "qwen2"),
        "self_attn.v_proj": (keys, hidden, biased or family == "qwen2"),
        "self_attn.o_proj": (hidden, queries, biased),
    }
    networks = ["mlp."]
    if family == "qwen3_moe":
        inner, experts = positive_int(config, "moe_intermediate_size"), num_experts(config)
        networks = [f"mlp.experts.{expert}." for expert in range(experts)]
        linears["mlp.gate"] = (experts, hidden, False)
    for network in networks:
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            linears[f"{network}{name}_proj"] = (rows, columns, family == "llama" and bool(config.get("mlp_bias")))
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(positive_int(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if family == "gemma3_text":
            yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
            yield prefix + "post_feedforward_layernorm.weight", (hidden,)
        if family in ("qwen3", "qwen3_moe", "gemma3_text"):
            yield prefix + "self_attn.q_norm.weight", (size,)
            yield prefix + "self_attn.k_norm.weight", (size,)
        for name, (rows, columns, bias) in linears.items():
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
    yield "model.norm.weight", (hidden,)
    if not is_tied(config):
        yield "lm_head.weight", (vocab, hidden)


def check_shapes(config: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelError for sizes in a configuration that the tensors of its files do not have: they are told before
    memory is taken for what the configuration states, which may be more than there is. ``stored`` has their shapes by
    Hugging Face parameter names; which ones are missing is seen when they are loaded."""
    indices = [int(found[1]) for name in stored if (found := LAYER.match(name))]
    layers = max(indices, default=-1) + 1
    if layers and (stated := config.get("num_hidden_layers")) and stated > layers:
        raise ModelError(
            f"the configuration states {stated} layers (num_hidden_layers), the files have those of {layers}"
        )
    for name, size in parameter_shapes(config) if layers else ():
        if (shape := stored.get(name, size)) != size:
            raise ModelError(f"tensor {name!r} has shape {list(shape)}, the configuration needs {list(size)}")
