"""The config.json of a model folder: mistakes in it are told by name before anything is made of its fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.engine.checkpoint.json_file import read_json_object
from slipstream.engine.checkpoint.shapes import FAMILIES
from slipstream.engine.checkpoint.text_part import text_part
from slipstream.engine.errors import ModelError

USUAL: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256},
}
"""Sizes that transformers takes where a file of a family says nothing; null is none of these, but what it is in all
families."""


def read_config(path: Path) -> tuple[dict[str, Any], bool]:
    """The configuration in a file, and whether it is that of a part of the model: of the decoder in one that also sees,
    where that is of a family that runs natively.

    ModelError names a field of the families that run natively which holds another kind of value than it should. Those
    of other families transformers looks at itself."""
    config = read_json_object(path)
    part = text_part(config)
    config = part or config
    family = config.get("model_type")
    if not isinstance(family, str | None):
        raise _wrong(path, "model_type", family, "a text")
    if family not in FAMILIES:
        return config, False
    config = USUAL.get(family, {}) | config
    for name, (is_right, kind) in FIELDS.items():
        if name in config and not is_right(value := config[name]):
            raise _wrong(path, name, value, kind)
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds and layers and len(kinds) != layers:
        raise ModelError(f"{path} has {len(kinds)} layer_types for {layers} layers (num_hidden_layers)")
    return config, part is not None


def _wrong(path: Path, name: str, value: object, kind: str) -> ModelError:
    return ModelError(f"{path} has {name} = {repr(value)[:60]}, {kind} is needed")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _up_to(most: int) -> Callable[[Any], bool]:
    return lambda value: _is_count(value) and value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_list_of_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _or_null(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _of_types(*types: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, types)


_COUNT = "a positive whole number"
MOST_LAYERS, MOST_EXPERTS, LARGEST = 1000, 4096, 2**31 - 1
"""More than models have: what is computed of sizes (names of all tensors, bytes) is bounded by these."""
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "moe_intermediate_size"),
        (_up_to(LARGEST), f"{_COUNT} up to {LARGEST}"),
    ),
    "num_hidden_layers": (_up_to(MOST_LAYERS), f"{_COUNT} up to {MOST_LAYERS}"),
    **dict.fromkeys(("num_experts_per_tok", "decoder_sparse_step"), (_is_count, _COUNT)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts"), (_or_null(_up_to(MOST_EXPERTS)), f"{_COUNT} up to {MOST_EXPERTS}")
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), (_or_null(_up_to(LARGEST)), f"{_COUNT} up to {LARGEST}")),
    "sliding_window_pattern": (_or_null(_is_count), _COUNT),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), (_or_null(_is_count), _COUNT)),
    "sliding_window": (_or_null(_is_whole), f"{_COUNT} or null"),
    "max_window_layers": (_is_whole, "a whole number"),
    "rms_norm_eps": (_is_number, "a number that is not negative"),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
        (lambda value: _is_number(value) and value > 0, "a positive number"),
    ),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob"),
        (_of_types(bool), "true or false"),
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation"), (_of_types(str), "the name of a function")),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (_of_types(dict), "an object or null")),
    "layer_types": (_is_list_of_texts, "a list of texts"),
    "mlp_only_layers": (_of_types(list), "a list of numbers"),
}
"""What fields may hold: a test, and the words for it. Others are not read, or were looked at where they are."""
