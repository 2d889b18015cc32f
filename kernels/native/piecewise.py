"""Layers that the compiled call does not cover, of matrices that stay packed: from operation to operation, with
compiled matrices and attention."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from slipstream.kernels.compute import PACKED, Formats, LayerShape, LayerWeights
from slipstream.kernels.kept import KeepsMatrices
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.library import isa, load, supports
from slipstream.kernels.native.quantised import Arena, StoredWeight, packed_bytes, rounds_fast
from slipstream.kernels.torch_stack import TorchCompute
from slipstream.kernels.weight import Weight


class _Matrix(StoredWeight):
    """Answers in the format of activations."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).to(self.dtype)


class PiecewiseCompute(KeepsMatrices, TorchCompute):
    """For mixtures of experts, and for Gemma's layers."""

    cache_class = NativeKVCache
    is_fast_in_bfloat16 = True

    def __init__(self, formats: Formats, device: torch.device) -> None:
        super().__init__(formats, device)
        self._arena = Arena()

    @classmethod
    def supports(cls, shape: LayerShape, device: torch.device) -> bool:
        inner = shape.intermediate if shape.mixture is None else shape.mixture.intermediate
        return device.type == "cpu" and load() is not None and supports(shape.head_dim, shape.hidden, inner)

    @classmethod
    def rounds_fast(cls) -> bool:
        return rounds_fast()

    @classmethod
    def packed_bytes(cls, shape: LayerShape, kind: str, n: int, k: int) -> int:
        return packed_bytes(kind, n, k)

    @classmethod
    def set_threads(cls, count: int) -> None:
        library = load()
        assert library is not None
        library.slip_set_threads(count)
        torch.set_num_threads(1)  # which would spin beside those of the kernels

    @property
    def name(self) -> str:
        return f"native-{isa()}-piecewise"

    def weight(self, n: int, k: int, bias: bool = False, module: str = "") -> Weight:
        formats = self.formats
        if formats.weights != PACKED:
            return super().weight(n, k, bias)
        as_blocks = (formats.blocks_of_numbers(module),)
        return _Matrix(
            n, k, formats.compute, bias, arithmetic=formats.arithmetic, arena=self._arena, numbers_as=as_blocks
        )

    def take_forms(self, part: Weight | LayerWeights, forms: Hashable) -> None:
        if self.formats.arithmetic != "bfloat16" or self.formats.quantize != "none":  # as in ``NativeCompute``
            super().take_forms(part, forms)
