"""The Llama family through the compiled decoder stack: the fast path on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from slipstream.engine.models.config import DecoderConfig, cache_shape, rope_tables
from slipstream.engine.models.native_layer import NativeLayer
from slipstream.engine.models.protocol import DecoderModel, Forward
from slipstream.engine.models.weights import WeightSlots
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.library import DTYPE_CODES, CLayer, CModel, address, c_batch, isa, load, supports
from slipstream.kernels.native.linear import PackedLinear


class NativeDecoder:
    """Weights live as panels only; the whole stack runs in one call without the interpreter lock."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, max_length: int) -> None:
        self.shape = config.shape
        self.switch_length = 0
        self.dtype = dtype
        self.kernels = f"native-{isa()}"
        self._config = config
        library = load()
        assert library is not None
        self._library = library
        self._embed = PackedLinear(self.shape.vocab_size, config.hidden, dtype)
        self.head = self._embed if config.tied else PackedLinear(self.shape.vocab_size, config.hidden, dtype)
        # One piece of memory, in the order of reading: the system gives large pages to pieces of 2 MiB and more only.
        memory = torch.zeros(self.shape.num_layers, NativeLayer.num_elems(config), dtype=dtype)
        self._layers = [NativeLayer(config, dtype, memory=part) for part in memory]
        self._final_norm = torch.ones(config.hidden)
        self._cos, self._sin = rope_tables(config, max_length)
        self._c_layers = (CLayer * self.shape.num_layers)()
        self._c = self._c_model()
        self._taps: tuple[int, ...] = ()
        self._tapped = torch.empty(0, dtype=torch.int32)
        self._cache: Tensor | None = None
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, self.shape.vocab_size)

    @staticmethod
    def supports(config: DecoderConfig) -> bool:
        return load() is not None and supports(config.shape.head_dim, config.hidden, config.intermediate)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        slots = WeightSlots(self._config.parameters)
        for name, tensor in tensors:
            if slots.take(name, tensor):
                self._fill(name, tensor)
        slots.check_complete()

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return NativeKVCache(cache_shape(self.shape, block_size, self.dtype), num_blocks, self.device)

    @property
    def decoder(self) -> DecoderModel:
        return self

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        self._bind(cache)
        hidden = torch.empty(batch.num_tokens, self._config.hidden)
        features = torch.empty(batch.num_tokens, len(taps), self._config.hidden) if taps else None
        self._tap(taps, features)
        c = c_batch(batch)
        self._library.slip_forward(
            ctypes.byref(self._c), ctypes.byref(c), address(hidden), self._memory(batch.num_tokens)
        )
        return Forward(hidden, features)

    def logits(self, hidden: Tensor, rows: Int32) -> Tensor:
        vocab = self.shape.vocab_size
        if len(rows) > len(self._logits):
            # Kept, because fresh memory of this size is mapped page by page at every step.
            self._logits = torch.empty(len(rows), vocab)
        out = self._logits[: len(rows)]
        self._library.slip_logits(
            *(ctypes.byref(self._c), address(hidden), rows.ctypes.data, len(rows), address(out), vocab),
            self._memory(len(rows)),
        )
        return out

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[n, hidden] float32: what the output matrix reads of the last layer's output."""
        return ops.rms_norm(hidden, self._final_norm, self._config.norm_eps)

    @property
    def embedding(self) -> PackedLinear:
        """The token embeddings, as panels."""
        return self._embed

    @property
    def config(self) -> DecoderConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _memory(self, tokens: int) -> int:
        """Scratch for a step of this many tokens; grows and stays."""
        size = self._library.slip_workspace_bytes(ctypes.byref(self._c), tokens)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()

    def _tap(self, taps: tuple[int, ...], features: Tensor | None) -> None:
        if taps != self._taps:
            self._taps, self._tapped = taps, torch.tensor(taps, dtype=torch.int32)
            self._c.taps, self._c.num_taps = address(self._tapped), len(taps)
        self._c.features = address(features)

    def _bind(self, cache: PagedKVCache) -> None:
        assert isinstance(cache, NativeKVCache)
        if cache.layers is self._cache:
            return
        for layer, (keys, values) in zip(self._c_layers, cache.layers, strict=True):
            layer.k_cache, layer.v_cache = address(keys), address(values)
        self._cache = cache.layers

    def _fill(self, name: str, tensor: Tensor) -> None:
        """Copies one Hugging Face tensor to its place; projections share panels (q, k, v; gate, up)."""
        match name.split("."):
            case ["model", "embed_tokens", "weight"]:
                self._embed.fill(tensor)
            case ["lm_head", "weight"]:
                self.head.fill(tensor)
            case ["model", "norm", "weight"]:
                self._final_norm.copy_(tensor)
            case ["model", "layers", index, *rest]:
                self._layers[int(index)].fill(rest, tensor)

    def _c_model(self) -> CModel:
        config = self._config
        for c, layer, window in zip(self._c_layers, self._layers, config.windows, strict=True):
            layer.describe(c, window)
        return CModel(
            dtype=DTYPE_CODES[self.dtype],
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            intermediate=config.intermediate,
            num_layers=self.shape.num_layers,
            norm_eps=config.norm_eps,
            rope_cos=address(self._cos),
            rope_sin=address(self._sin),
            layers=self._c_layers,
            embed=self._embed.c,
            lm_head=self.head.c,
            final_norm=address(self._final_norm),
        )
