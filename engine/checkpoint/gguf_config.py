"""Translates the metadata of GGUF files into Hugging Face's configurations, checked against their tensors."""

from __future__ import annotations

import math
from typing import Any

from slipstream.engine.checkpoint.gguf_architectures import ARCHITECTURES, UNTRANSLATED, Architecture, architecture
from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.checkpoint.gguf_metadata import ModelMetadata
from slipstream.engine.checkpoint.gguf_tensors import Place, places
from slipstream.engine.checkpoint.shapes import FAMILIES, head_dim, parameter_shapes
from slipstream.engine.errors import ModelError

ROPE_FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"


def translate(file: GGUFFile) -> tuple[dict[str, Any], dict[str, Place]]:
    """The model's configuration as Hugging Face's config.json states it, and where its parameters lie in the file, by
    their Hugging Face names; each checked against the other."""
    meta = ModelMetadata(file)
    kind = _supported(meta)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no token embedding (token_embd.weight), so it is not a language model")
    hidden = meta.count(".embedding_length")
    heads = meta.count(".attention.head_count")
    config: dict[str, Any] = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.count(".feed_forward_length"),
        "num_hidden_layers": meta.count(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count(".attention.head_count_kv", default=heads),
        "head_dim": meta.count(".attention.key_length", default=hidden // heads or 1),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": meta.count(".context_length"),
        "rms_norm_eps": meta.number(".attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = meta.token_id(f"{name}_token_id")
    config["pad_token_id"] = meta.token_id("padding_token_id")
    size, kv_heads = head_dim(config), config["num_key_value_heads"]
    rotated = meta.count(".rope.dimension_count", default=size)
    if rotated != size and not (kind.partly_rotated and rotated < size and rotated % 2 == 0):
        raise meta.unsupported(f"{meta.full('.rope.dimension_count')} other than the head size {size}")
    if meta.count(".attention.value_length", default=size) != size:
        raise meta.unsupported(f"{meta.full('.attention.value_length')} other than the head size {size}")
    if size % 2 or heads % kv_heads:
        raise ModelError(f"{file.path} states {heads} heads of size {size} for {kv_heads} KV heads")
    if config["num_hidden_layers"] > len(file.tensors):
        raise ModelError(f"{file.path} states {config['num_hidden_layers']} layers but has {len(file.tensors)} tensors")
    config["rope_parameters"] = _rope_parameters(meta, config, rotated)
    config |= kind.more(meta, config)
    found = places(file, kind, heads, kv_heads)
    if config["model_type"] in FAMILIES:  # of others, transformers says which ones it lacks
        _check_tensors(file, config, found)
    return config, found


def translate_generation_config(file: GGUFFile) -> dict[str, Any]:
    """What generation_config.json states: the tokens that end a text and the recommended sampling parameters."""
    meta = ModelMetadata(file)
    ends = [end for name in ("eos_token_id", "eot_token_id", "eom_token_id") for end in meta.token_ids(name)]
    config: dict[str, Any] = {
        "bos_token_id": meta.token_id("bos_token_id"),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": meta.token_id("padding_token_id"),
    }
    sampling = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    for key, name in sampling.items():
        value = meta.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and math.isfinite(value):
            config[name] = value
    return {key: value for key, value in config.items() if value is not None and value != []}


def _supported(meta: ModelMetadata) -> Architecture:
    kind = architecture(meta)
    if kind is None:
        raise ModelError(
            f"{meta.file.path} holds a model of architecture {meta.arch!r}. GGUF files are translated for "
            f"{', '.join(ARCHITECTURES)} (llama covers Llama, Mistral, Mixtral and SmolLM); serve any other model from "
            "its Hugging Face folder, which works through the transformers fallback."
        )
    for key in UNTRANSLATED:
        if key not in kind.keys and meta.get("." + key):
            raise meta.unsupported(f"{meta.arch}.{key}")
    return kind


def _rope_parameters(meta: ModelMetadata, config: dict[str, Any], rotated: int) -> dict[str, Any]:
    """``rotated``: how many numbers of a head are."""
    file, prefix = meta.file, ".rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.number(prefix + "freq_base", default=10000.0)}
    if rotated != config["head_dim"]:
        rope["partial_rotary_factor"] = rotated / config["head_dim"]
    scaling = meta.get(prefix + "scaling.type", "none")
    if SHORT in file.tensors and LONG in file.tensors:
        original = meta.count(prefix + "scaling.original_context_length", default=config["max_position_embeddings"])
        config["original_max_position_embeddings"] = original
        if prefix + "scaling.attn_factor" in meta:
            rope["attention_factor"] = meta.number(prefix + "scaling.attn_factor")
        return rope | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "short_factor": _factors(file, SHORT, rotated),
            "long_factor": _factors(file, LONG, rotated),
        }
    if ROPE_FACTORS in file.tensors:
        if scaling != "none":
            raise meta.unsupported(f"rope scaling {scaling!r} together with {ROPE_FACTORS}")
        factors = _factors(file, ROPE_FACTORS, rotated)
        # Llama 3's scaling in its computed form: frequency i is divided by factors[i]. Hugging Face's name for
        # factors that are given one by one is longrope.
        return rope | {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
            "short_factor": factors,
            "long_factor": factors,
        }
    if scaling == "none" and prefix + "scale_linear" in meta:  # the key of files from before August 2023
        return rope | {"rope_type": "linear", "factor": meta.number(prefix + "scale_linear")}
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise meta.unsupported(f"rope scaling {scaling!r} (none, linear and yarn are supported)")
    rope |= {"rope_type": scaling, "factor": meta.number(prefix + "scaling.factor")}
    if scaling == "linear" and prefix + "scaling.original_context_length" in meta:
        rope["original_max_position_embeddings"] = meta.count(prefix + "scaling.original_context_length")
    if scaling == "yarn":
        if meta.number(prefix + "scaling.yarn_ext_factor", default=1.0) != 1.0:
            raise meta.unsupported(f"{meta.full(prefix)}scaling.yarn_ext_factor other than 1")
        original = meta.count(prefix + "scaling.original_context_length", default=config["max_position_embeddings"])
        rope["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if prefix + f"scaling.yarn_{name}" in meta:
                rope[name] = meta.number(prefix + f"scaling.yarn_{name}")
        # llama.cpp multiplies yarn's usual attention factor by these two, Hugging Face states the product.
        relative = math.prod(meta.number(prefix + f"scaling.{key}", 1.0) for key in ("attn_factor", "yarn_attn_factor"))
        if relative != 1.0:
            rope["attention_factor"] = relative * (0.1 * math.log(max(rope["factor"], 1.0)) + 1.0)
    return rope


def _factors(file: GGUFFile, name: str, rotated: int) -> list[float]:
    """What frequencies are divided by."""
    if (shape := file.tensors[name].shape) != (rotated // 2,):
        raise ModelError(
            f"{file.path}: {name} has shape {list(shape)}, half of the {rotated} rotated numbers of a head are needed"
        )
    factors: list[float] = file.tensor(name).astype("float64").tolist()
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelError(f"{file.path}: {name} holds values that are not positive. Convert the model again.")
    return factors


def _check_tensors(file: GGUFFile, config: dict[str, Any], found: dict[str, Place]) -> None:
    """Every parameter the configuration implies is there in its shape, and nothing else."""
    left = dict(found)
    for name, shape in parameter_shapes(config):
        place = left.pop(name, None)
        if place is None:
            raise ModelError(f"{file.path} lacks the tensor for {name}. Download or convert the file again.")
        if place.shape != shape:
            raise ModelError(
                f"{file.path}: tensor {place.info.name!r} has shape {list(place.shape)} where the metadata asks for "
                f"{list(shape)}. Download or convert the file again."
            )
    if left:
        extra = next(iter(left.values())).info.name
        raise ModelError(f"{file.path}: the model that the metadata describes has no place for tensor {extra!r}")
