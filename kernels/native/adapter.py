"""Low-rank adapters for the compiled layers: A as panels, B by the panels of the matrix it is added to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.compute import LayerShape
from slipstream.kernels.memory import reserved_zeros
from slipstream.kernels.native.layer import matrix_shapes, places
from slipstream.kernels.native.library import MATRICES, CAdapter, address
from slipstream.kernels.native.weight import PANEL, PackedWeight, panels_elems

Part = tuple[Tensor, Tensor, int, int]
"""A, B, and where the panels of the matrix with that name begin, and how far they are apart."""


class _Added:
    """To one matrix of a layer, which may hold several that have their own names: their A are behind each other."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, parts: Sequence[Part]) -> None:
        self._k, self._dtype, self._parts = k, dtype, parts
        self._pair = 2 if dtype is torch.bfloat16 else 1
        self.rank = max(-(-len(a) // self._pair) * self._pair for a, *_ in parts)
        self._rows = -(-len(parts) * self.rank // PANEL) * PANEL
        self.begins = torch.full((n // PANEL,), -1, dtype=torch.int32)
        self.sizes = [panels_elems(self._rows, k), n * self.rank]
        """Numbers of A and of B."""

    def fill(self, memory: Tensor) -> None:
        """``memory`` [sum of sizes], zeros."""
        down, up = torch.split(memory, self.sizes)
        pair, parts, self._parts = self._pair, self._parts, ()
        self.down = PackedWeight(self._rows, self._k, self._dtype, memory=down)
        self.up = up.view(-1, self.rank // pair, PANEL, pair)
        for index, (a, b, first, stride) in enumerate(parts):
            self.down.fill(a, index * self.rank)
            filled = functional.pad(b.float(), (0, self.rank - len(a))).view(-1, PANEL, self.rank // pair, pair)
            panels = slice(first, first + stride * len(filled), stride)
            self.up[panels] = filled.transpose(1, 2).to(self._dtype)
            self.begins[panels] = index * self.rank


class NativeAdapter(Adapter):
    def __init__(self, shape: LayerShape, layers: Iterable[LayerMatrices], dtype: torch.dtype) -> None:
        self._layers = [self._filled(dict(self._added(shape, layer, dtype)), dtype) for layer in layers]
        self.c = [self._described(layer) for layer in self._layers]
        """The C struct of each layer, to be copied; valid while the adapter lives."""
        self.rank = max((each.down.n for layer in self._layers for each in layer.values()), default=0)
        """The most rows that an A has, with those that fill up panels."""

    @staticmethod
    def _filled(layer: dict[int, _Added], dtype: torch.dtype) -> dict[int, _Added]:
        """In memory of its own, which goes back to the system with the adapter: what allocators keep is lost to it."""
        sizes = [sum(each.sizes) for each in layer.values()]
        memory = reserved_zeros((sum(sizes),), dtype, 0)
        for each, part in zip(layer.values(), torch.split(memory, sizes), strict=True):
            each.fill(part)
        return layer

    @staticmethod
    def _added(shape: LayerShape, layer: LayerMatrices, dtype: torch.dtype) -> Iterator[tuple[int, _Added]]:
        where = places(shape)
        for index, (matrix, size) in enumerate(zip(MATRICES, matrix_shapes(shape), strict=True)):
            parts = [
                (*pair, *where[module][1:])
                for name, pair in layer.items()
                if where[module := name.rpartition(".")[2]][0] == matrix
            ]
            if parts:
                yield index, _Added(size.n, size.k, dtype, parts)

    @staticmethod
    def _described(layer: dict[int, _Added]) -> CAdapter:
        c = CAdapter()
        for index, added in layer.items():
            c.down[index], c.up[index] = added.down.c, address(added.up)
            c.begins[index], c.rank[index] = address(added.begins), added.rank
        return c
