"""What a model's parts are made by where Triton's kernels run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.attention.backend import AttentionBackend
from slipstream.kernels.attention.choice import against, wanted
from slipstream.kernels.compute import PACKED, Compute, Formats, LayerShape, LayerWeights, Stack
from slipstream.kernels.kept import KeepsMatrices
from slipstream.kernels.kv_cache import CacheShape, PagedKVCache
from slipstream.kernels.torch_stack import TorchCompute
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.adapter import TritonAdapter
from slipstream.kernels.triton.graphs import GraphPool
from slipstream.kernels.triton.grouped import GroupedWeight, grouped_bytes
from slipstream.kernels.triton.kv_cache import TritonKVCache
from slipstream.kernels.triton.layer import FusedLayer
from slipstream.kernels.triton.linear import InvariantWeight
from slipstream.kernels.triton.single import SingleWeight
from slipstream.kernels.triton.stack import INVARIANT_TILE, TritonStack
from slipstream.kernels.weight import Weight


class TritonCompute(KeepsMatrices, TorchCompute):
    cache_class = TritonKVCache
    can_be_batch_invariant = True
    makes_chains = True

    def __init__(
        self,
        formats: Formats,
        device: torch.device,
        graphs: GraphPool | None = None,
        attention: AttentionBackend | None = None,
        invariant: bool = False,
    ) -> None:
        """``graphs`` of all stacks together; without them, all work is launched piece by piece.

        ``attention`` computes what it can of attention, Triton the rest; by default everything. ``invariant``: with
        the same bits for a row in any batch, which ``attention`` has to have, too.
        """
        super().__init__(formats, device)
        self.graphs = GraphPool(device, 0) if graphs is None else graphs
        self._attention, self.is_batch_invariant = attention, invariant

    @classmethod
    def supports(cls, shape: LayerShape, device: torch.device) -> bool:
        return launch.runs_on(device.type) and shape.head_dim <= 256 and shape.head_dim % 2 == 0

    @property
    def name(self) -> str:
        return f"triton-{self.device.type}" + ("" if self._attention is None else f"-{self._attention.name}")

    @classmethod
    def packed_bytes(cls, shape: LayerShape, kind: str, n: int, k: int) -> int:
        return 0 if shape.mixture is not None else grouped_bytes(kind, n, k)

    def weight(self, n: int, k: int, bias: bool = False, module: str = "") -> Weight:
        packed = self.formats.weights == PACKED
        dtype = self.formats.compute if packed else getattr(torch, self.formats.weights)
        dense = InvariantWeight if self.is_batch_invariant else SingleWeight
        make = partial(dense, n, k, dtype, self.device, bias)
        tile_rows = INVARIANT_TILE if self.is_batch_invariant else 0
        if not packed:
            return make()
        as_blocks = self.formats.blocks_of_numbers(module)
        return GroupedWeight(n, k, self.device, make, dtype, bias, tile_rows, as_blocks)

    @property
    def for_drafts(self) -> Compute:
        """In 4 bits heads would draft worse than in 8."""
        if self.formats.quantize != "q4":
            return self
        formats = replace(self.formats, quantize="q8")
        return TritonCompute(formats, self.device, self.graphs, self._attention, self.is_batch_invariant)

    def cache(self, shape: CacheShape, num_blocks: int) -> PagedKVCache:
        """The backend may cover a model, and not a drafter beside it."""
        attention = self._attention
        if attention is not None and against(attention.name, wanted(shape, self.formats.compute, self.device)):
            attention = None
        return TritonKVCache(shape, num_blocks, self.device, attention)

    def layers(self, shape: LayerShape, count: int) -> Sequence[LayerWeights]:
        return [FusedLayer(shape, self) for _ in range(count)]

    def stack(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> Stack:
        graphs, invariant = self.graphs, self.is_batch_invariant
        return TritonStack(shape, windows, rope, self.formats, self.device, graphs, invariant, window_rope)

    def adapter(self, shape: LayerShape, layers: Iterable[LayerMatrices]) -> Adapter:
        return TritonAdapter(shape, layers, self.formats.compute, self.device)
