"""Decoder layers in one compiled call, without the interpreter lock: the fast path on the CPU."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels.adapter import Adapter, LayerMatrices
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch
from slipstream.kernels.compute import (
    PACKED,
    ChainInputs,
    Chains,
    Compute,
    Formats,
    Forward,
    LayerShape,
    LayerWeights,
    Stack,
)
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.native.adapter import NativeAdapter
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.layer import NativeLayer, matrix_shapes
from slipstream.kernels.native.library import (
    CACHE_FORMS,
    DTYPE_CODES,
    CAdapter,
    CChains,
    CLayer,
    CModel,
    address,
    c_batch,
    isa,
    load,
    supports,
)
from slipstream.kernels.native.quantised import Arena, StoredWeight, form_of, packed_bytes, rounds_fast
from slipstream.kernels.native.weight import PackedWeight, PanelWeight, panels_elems
from slipstream.kernels.stored import Stored
from slipstream.kernels.weight import Weight


class NativeStack:
    """What the compiled code is given: addresses of weights, of tables and of a cache, and memory for a step.

    To use other weights is to write other addresses, which takes microseconds.
    """

    def __init__(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        dtype: torch.dtype,
    ) -> None:
        library = load()
        assert library is not None
        self._library = library
        self._hidden, self._windows = shape.hidden, windows
        self._cos, self._sin = rope
        self._c_layers = (CLayer * len(windows))()
        self._c = CModel(
            dtype=DTYPE_CODES[dtype],
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            num_layers=len(windows),
            norm_eps=shape.norm_eps,
            rope_cos=address(self._cos),
            rope_sin=address(self._sin),
            layers=self._c_layers,
        )
        # Whoever owns the memory that the struct points to.
        self._weights: tuple[PanelWeight, Sequence[LayerWeights], Tensor | None, PanelWeight]
        self._adapters: Sequence[Adapter | None] = ()
        self._cache: weakref.ref[Tensor] | None = None
        """Memory of the cache that the struct points to; not kept from being released."""
        self._taps: tuple[int, ...] = ()
        self._c_taps = torch.empty(0, dtype=torch.int32)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._rows = torch.empty(0, dtype=torch.int32)
        self._logits = torch.empty(0, 0)

    def use(self, embedding: Weight, layers: Sequence[LayerWeights], norm: Tensor | None, output: Weight) -> None:
        assert isinstance(embedding, PanelWeight) and isinstance(output, PanelWeight)
        is_quantised = output.is_quantised
        for c, layer, window in zip(self._c_layers, layers, self._windows, strict=True):
            assert isinstance(layer, NativeLayer)
            layer.describe(c, window)
            is_quantised |= layer.is_quantised
        self._c.quantised = is_quantised
        self._c.embed, self._c.lm_head, self._c.final_norm = embedding.c, output.c, address(norm)
        self._weights = embedding, layers, norm, output

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        known: list[tuple[int, NativeAdapter]] = []
        for at, adapter in enumerate(adapters):
            if adapter is not None:
                assert isinstance(adapter, NativeAdapter)
                known.append((at, adapter))
        self._adapters, self._c.adapter_rank = adapters, max((adapter.rank for _, adapter in known), default=0)
        for index, c_layer in enumerate(self._c_layers):
            c_layer.adapters = c_adapters = (CAdapter * len(adapters))()
            for at, adapter in known:
                c_adapters[at] = adapter.c[index]

    def forget(self) -> None:
        del self._weights

    def forward(
        self, batch: RaggedBatch, cache: PagedKVCache, hidden: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> Forward:
        self._bind(cache)
        tokens = batch.num_tokens
        self._c.given_hidden = hidden is not None
        hidden = torch.empty(tokens, self._hidden) if hidden is None else hidden.contiguous()
        features = torch.empty(tokens, len(taps), self._hidden) if taps else None
        if taps != self._taps:
            self._taps, self._c_taps = taps, torch.tensor(taps, dtype=torch.int32)
            self._c.taps, self._c.num_taps = address(self._c_taps), len(taps)
        self._c.features = address(features)
        c = c_batch(batch)
        self._library.slip_forward(ctypes.byref(self._c), ctypes.byref(c), address(hidden), self._memory(tokens))
        return Forward(hidden, features, tuple(map(torch.from_numpy, batch.columns)))

    def chains(self, given: ChainInputs, cache: PagedKVCache) -> Chains | None:
        return None

    def draft(self, asked: HostChains, cache: PagedKVCache, hidden: Tensor) -> MadeChains | None:
        self._bind(cache)
        count, depth = len(asked.starts), asked.depth
        ones = np.ones(count, np.int32)
        batch = make_batch(ones, ones, asked.starts, asked.block_tables, asked.table_row, asked.block_size)
        tokens, counts = np.zeros((count, depth), np.int32), np.zeros(count, np.int32)
        made = MadeChains(tokens, np.zeros((count, depth)), counts)
        out, c = self._room_for_logits(count), c_batch(batch)
        given = (asked.most, asked.mapped, *asked.filters, asked.seeds, asked.indices)
        chains = CChains(
            *(out.shape[1], asked.runners, asked.sharpness, asked.stop_below, address(asked.vocabulary)),
            *(array.ctypes.data for array in given),
            *(depth, 0, made.tokens.ctypes.data, made.likely.ctypes.data, made.counts.ctypes.data),
        )
        self._c.given_hidden, self._c.features = True, None
        self._library.slip_draft(
            *(ctypes.byref(self._c), ctypes.byref(c), ctypes.byref(chains), address(hidden), address(out)),
            self._memory(count),
        )
        return made

    def logits(self, hidden: Tensor, rows: Int32 | Tensor | None = None) -> Tensor:
        out = self._room_for_logits(len(hidden) if rows is None else len(rows))
        rows = self._rows if rows is None else rows
        chosen = rows.data_ptr() if isinstance(rows, Tensor) else rows.ctypes.data
        self._library.slip_logits(
            *(ctypes.byref(self._c), address(hidden), chosen, len(out), address(out), out.shape[1]),
            self._memory(len(out)),
        )
        return out

    def _room_for_logits(self, count: int) -> Tensor:
        vocab = self._weights[3].n
        if self._logits.shape[1] != vocab or count > len(self._logits):
            # Kept, because fresh memory of this size is mapped page by page at every step.
            self._logits = torch.empty(count, vocab)
            self._rows = torch.arange(count, dtype=torch.int32)
        return self._logits[:count]

    def _memory(self, tokens: int) -> int:
        """Scratch for a step of this many tokens; grows and stays."""
        size = self._library.slip_workspace_bytes(ctypes.byref(self._c), tokens)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()

    def _bind(self, cache: PagedKVCache) -> None:
        assert isinstance(cache, NativeKVCache)
        memory, scales = cache.layers, cache.scales
        if self._cache is None or memory is not self._cache():
            for c, (keys, values) in zip(self._c_layers, memory, strict=True):
                c.k_cache, c.v_cache = address(keys), address(values)
            if scales is not None:
                for c, (keys, values) in zip(self._c_layers, scales, strict=True):
                    c.k_scales, c.v_scales = address(keys), address(values)
            self._c.cache_form = CACHE_FORMS.get(cache.shape.dtype, 0)
            self._cache = weakref.ref(memory)


FAST_IN_BYTES = ("avx2", "avx2vnni", "avx512", "avx512vnni", "avx512bf16", "avx512amx")
"""Instruction sets with which products of bytes were measured to be faster than of other numbers; with tiles (AMX) few
rows, which are what a head has, are computed as without."""


class NativeCompute(Compute):
    cache_class = NativeKVCache
    is_batch_invariant = can_be_batch_invariant = True
    is_fast_in_bfloat16 = True

    @classmethod
    def rounds_fast(cls) -> bool:
        return rounds_fast()

    def __init__(self, formats: Formats, device: torch.device) -> None:
        known = PACKED if formats.weights == PACKED else formats.numbers
        kv = formats.kv if formats.kv in CACHE_FORMS else formats.compute
        expected = replace(formats, weights=known, kv=kv)
        assert formats == expected, "the compiled kernels have one format for all but packed weights and 8-bit caches"
        super().__init__(formats, device)

    @classmethod
    def supports(cls, shape: LayerShape, device: torch.device) -> bool:
        is_there = device.type == "cpu" and load() is not None
        return is_there and shape.is_plain and supports(shape.head_dim, shape.hidden, shape.intermediate)

    @classmethod
    def packed_bytes(cls, shape: LayerShape, kind: str, n: int, k: int) -> int:
        return packed_bytes(kind, n, k)

    def takes_blocks(self, shape: LayerShape, kind: str, n: int, k: int) -> bool:
        return form_of(kind, k) > 0  # panels of numbers are filled with them, too

    @classmethod
    def set_threads(cls, count: int) -> None:
        library = load()
        assert library is not None
        library.slip_set_threads(count)
        # torch's own threads would spin beside those of the kernels; what is left to torch is small.
        torch.set_num_threads(1)

    @property
    def name(self) -> str:
        return f"native-{isa()}"

    @property
    def for_drafts(self) -> Compute:
        """Weights in 8 bits are read in half the time of bfloat16; in 4 bits heads would draft worse."""
        eight_bits = replace(self.formats, weights=PACKED, quantize="q8")
        if self.formats.compute is torch.bfloat16 and isa() in FAST_IN_BYTES:
            return NativeCompute(replace(eight_bits, arithmetic="int8"), self.device)
        return self if self.formats.quantize == "none" else NativeCompute(eight_bits, self.device)

    def weight(self, n: int, k: int, bias: bool = False, module: str = "") -> PanelWeight:
        formats = self.formats
        if formats.weights == PACKED:
            as_blocks = (formats.blocks_of_numbers(module),)
            return StoredWeight(n, k, formats.compute, bias, arithmetic=formats.arithmetic, numbers_as=as_blocks)
        return PackedWeight(n, k, formats.compute, bias)

    def forms(self, part: Weight | LayerWeights) -> Hashable:
        assert isinstance(part, PanelWeight | NativeLayer)
        return part.forms

    def take_forms(self, part: Weight | LayerWeights, forms: Hashable) -> None:
        assert isinstance(part, PanelWeight | NativeLayer)
        # Else blocks are only how numbers of bfloat16 came, unless somebody asked for them.
        if self.formats.arithmetic != "bfloat16" or self.formats.quantize != "none":
            part.take_forms(cast(Any, forms))

    def widen(self, part: Weight | LayerWeights, name: str) -> None:
        if isinstance(part, NativeLayer):
            part.widen(name)
        else:
            assert isinstance(part, PanelWeight)
            part.widen()

    def kept(self, part: Weight | LayerWeights, name: str, rows: Tensor) -> Tensor | Stored | None:
        if isinstance(part, NativeLayer):
            return part.kept(name, rows)
        assert isinstance(part, PanelWeight)
        return part.kept(rows)

    def norm(self, width: int) -> Tensor:
        return torch.ones(width)

    def layers(self, shape: LayerShape, count: int) -> Sequence[LayerWeights]:
        formats, sizes = self.formats, matrix_shapes(shape)
        if formats.weights == PACKED:
            make, arena, as_blocks = StoredWeight, Arena(), formats.blocks_of_numbers
            return [
                NativeLayer(
                    shape,
                    [
                        make(
                            *(each.n, each.k, formats.compute, each.bias, each.segments, formats.arithmetic, arena),
                            tuple(map(as_blocks, each.modules)),
                        )
                        for each in sizes
                    ],
                )
                for _ in range(count)
            ]
        # One piece of memory, in the order of reading: the system gives large pages to pieces of 2 MiB and more only.
        elems = [panels_elems(each.n, each.k) for each in sizes]
        memory = torch.empty(count, sum(elems), dtype=formats.compute)
        return [
            NativeLayer(
                shape,
                [
                    PackedWeight(each.n, each.k, formats.compute, each.bias, part)
                    for each, part in zip(sizes, layer.split(elems), strict=True)
                ],
            )
            for layer in memory
        ]

    def stack(
        self,
        shape: LayerShape,
        windows: Sequence[int],
        rope: tuple[Tensor, Tensor],
        window_rope: tuple[Tensor, Tensor] | None = None,
    ) -> Stack:
        assert window_rope is None, "which no plain layer has"
        return NativeStack(shape, windows, rope, self.formats.compute)

    def adapter(self, shape: LayerShape, layers: Iterable[LayerMatrices]) -> Adapter:
        return NativeAdapter(shape, layers, self.formats.compute)
