"""How two versions differ: what is said of them, what they scored, how far their weights moved."""

from __future__ import annotations

from typing import Any

import msgspec

from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Version

UNCOMPARED = frozenset({"gate", "weights_sha256", "weights_bytes", "format_version"})


class Difference(msgspec.Struct, frozen=True):
    """What differs between versions a and b."""

    fields: dict[str, tuple[Any, Any]]
    """Fields of the manifest and of states that differ: a's value and b's; None for what one lacks."""
    gate: dict[str, tuple[float | None, float | None]]
    """Every score of the gate that one of them has."""
    metrics: dict[str, tuple[float | None, float | None]]
    """Everything recorded while serving."""
    weights: dict[str, float | None]
    """Per tensor |b - a| / |a| (Frobenius norm); None where shapes differ or one has no such tensor."""


def compare(registry: Registry, a: int, b: int) -> Difference:
    """Raises UnknownVersionError or ModelError; of pruned versions no weights are compared."""
    first, second = registry.get(a), registry.get(b)
    described = [_describe(version) for version in (first, second)]
    fields = {
        name: (left, right) for name, (left, right) in _pairs(*described).items() if left != right and name != "version"
    }
    pruned = "pruned" in (first.state, second.state)
    return Difference(
        fields=fields,
        gate=_pairs(first.manifest.gate, second.manifest.gate),
        metrics=_pairs(first.metrics, second.metrics),
        weights={} if pruned else _weight_changes(registry, a, b),
    )


def _describe(version: Version) -> dict[str, Any]:
    """Flat: head.hidden_size, training.steps, …"""
    whole = msgspec.to_builtins(version.manifest)
    whole |= {"state": version.state, "pinned": version.pinned}
    flat: dict[str, Any] = {}
    for name, value in whole.items():
        if name in ("head", "training"):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif name not in UNCOMPARED:
            flat[name] = value
    return flat


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}


def _weight_changes(registry: Registry, a: int, b: int) -> dict[str, float | None]:
    from slipstream.drafter.head import stored  # imports numpy

    first, second = (stored.read(registry.weights(version)) for version in (a, b))
    pairs = ((name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second]))
    return {name: None if left is None or right is None else stored.change(left, right) for name, left, right in pairs}
