"""Rotary positions as model files state them: what they mean for the context, and when they change with its length.

Two kinds depend on how long a sequence is. longrope (Phi-3) has one set of frequencies for sequences up to the original
length and another for longer ones; dynamic NTK stretches the frequencies beyond it. A sequence is computed with one set
from its first position on: the keys in the cache were rotated with it. So ``switch_length`` is a property of the model,
and a sequence that outgrows it is computed again; that is what transformers' own generate does for longrope.
Frequencies of dynamic NTK change with every position there, so that its result depends on how a prompt is cut; here
sequences beyond the switch get those of the longest sequence the model can take, which is vLLM's choice too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

EXTENDING = ("linear", "dynamic", "yarn")
"""Kinds whose factor multiplies the original context; other files state the context that results."""
LONGROPE = ("longrope", "su")
FROM_ORIGINAL = ("yarn", "llama3", *LONGROPE)
"""Kinds that are computed from the original context."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: rope_parameters of new config files, rope_theta and rope_scaling (``type``) of older ones.

    Of a file with both, rope_scaling counts, as in transformers: somebody has put it into a newer file. An original
    length beside them goes before one that is in them, as there.
    """
    given = config.get("rope_parameters") or {}
    rope = dict(config.get("rope_scaling") or given)
    kind = rope.pop("type", None)
    if theta := config.get("rope_theta") or given.get("rope_theta"):
        rope.setdefault("rope_theta", theta)
    rope["rope_type"] = rope.get("rope_type") or kind or "default"
    rope.setdefault("rope_theta", 10000.0)
    if rope["rope_type"] in FROM_ORIGINAL and (original := config.get("original_max_position_embeddings")):
        rope["original_max_position_embeddings"] = original
    return rope


def context_length(config: Mapping[str, Any], stated: int) -> int:
    """The longest sequence, where ``stated`` is max_position_embeddings.

    Qwen's and Vicuna's recipes leave max_position_embeddings at the length before scaling, others state the result:
    so the factor counts from the original length where a file names one. Where only some layers are scaled (Gemma 3),
    files state the result.
    """
    rope = rope_parameters(config)
    by_layer = "rope_local_base_freq" in config or is_nested(config.get("rope_parameters") or {})
    if rope["rope_type"] not in EXTENDING or by_layer:
        return stated
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings", stated)
    if _is_number(factor) and _is_number(original):
        stated = max(stated, math.floor(original * factor))
    return stated


def switch_length(config: Mapping[str, Any], stated: int) -> int:
    """Sequences longer than this have other frequencies from their first position on; 0 where none do."""
    lengths: list[int] = []
    for rope in _flat(rope_parameters(config)):
        kind = rope.get("rope_type") or rope.get("type")
        original = stated
        if kind in LONGROPE:
            if rope.get("short_factor") == rope.get("long_factor") and "short_mscale" not in rope:
                continue
            original = rope.get("original_max_position_embeddings", 0)
        elif kind != "dynamic":
            continue
        if _is_number(original) and original < context_length(config, stated):
            lengths.append(int(original))
    return min(lengths, default=0)


def is_nested(rope: Mapping[str, Any]) -> bool:
    """Whether the parameters are given by kinds of layers."""
    return any(isinstance(value, dict) for value in rope.values())


def _flat(rope: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters, or those of every kind of layer where they are given by kind."""
    nested = [value for value in rope.values() if isinstance(value, dict)]
    yield from nested or [rope]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
