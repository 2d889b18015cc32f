"""Matrices that are kept as they came, each by itself: what they tell of it, and what others of their size are told."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from slipstream.kernels.compute import LayerWeights
from slipstream.kernels.stored import Stored
from slipstream.kernels.weight import Weight


@runtime_checkable
class KeptWeight(Protocol):
    """Beside what a ``Weight`` does."""

    @property
    def forms(self) -> Hashable:
        """How it is packed."""

    def take_forms(self, forms: Any) -> None:
        """Has numbers that come packed so, as long as nothing else has come."""

    def widen(self) -> None:
        """Has everything that comes kept as numbers, and what has come already."""

    def kept(self, indices: Tensor) -> Tensor | Stored:
        """Rows as they are kept: filled into another one, nothing is rounded."""


class KeptLayer(LayerWeights, Protocol):
    @property
    def matrices(self) -> Mapping[str, Weight]:
        """Those that are kept by themselves, by their Hugging Face names within the layer, without ``.weight``."""


class KeepsMatrices:
    """The part of a ``Compute`` that has to do with how matrices are kept, for weights and layers such as these."""

    def forms(self, part: Weight | LayerWeights) -> Hashable:
        return tuple(each.forms if isinstance(each, KeptWeight) else None for each in _matrices(part))

    def take_forms(self, part: Weight | LayerWeights, forms: Hashable) -> None:
        for each, own in zip(_matrices(part), cast(tuple[Hashable, ...], forms), strict=True):
            if isinstance(each, KeptWeight):
                each.take_forms(own)

    def widen(self, part: Weight | LayerWeights, name: str) -> None:
        if (found := _matrix(part, name)) is not None:
            found.widen()

    def kept(self, part: Weight | LayerWeights, name: str, rows: Tensor) -> Tensor | Stored | None:
        found = _matrix(part, name)
        return None if found is None else found.kept(rows)


def _matrices(part: Weight | LayerWeights) -> list[Weight]:
    return list(cast(KeptLayer, part).matrices.values()) if hasattr(part, "matrices") else [cast(Weight, part)]


def _matrix(part: Weight | LayerWeights, name: str) -> KeptWeight | None:
    is_layer = hasattr(part, "matrices")
    found = cast(KeptLayer, part).matrices.get(name.removesuffix(".weight")) if is_layer else part
    return found if isinstance(found, KeptWeight) else None
