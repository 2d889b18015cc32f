"""The Llama family through the compiled decoder stack: the fast path on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.models.config import DecoderConfig, rope_tables
from slipstream.engine.models.weights import WeightSlots
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.library import DTYPE_CODES, CLayer, CModel, address, c_batch, isa, load, supports
from slipstream.kernels.native.linear import PANEL, PackedLinear


class _Layer:
    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        hidden, inner = config.hidden, config.intermediate
        head_dim = config.shape.head_dim
        self.qkv = PackedLinear(config.qkv_width, hidden, dtype, config.qkv_bias)
        self.out = PackedLinear(hidden, config.heads * head_dim, dtype, config.out_bias)
        self.gate_up = PackedLinear(2 * inner, hidden, dtype, config.mlp_bias)
        self.down = PackedLinear(hidden, inner, dtype, config.mlp_bias)
        self.attn_norm = torch.ones(hidden)
        self.mlp_norm = torch.ones(hidden)
        self.q_norm = torch.ones(head_dim) if config.qk_norm else None
        self.k_norm = torch.ones(head_dim) if config.qk_norm else None


class NativeDecoder:
    """Weights live as panels only; the whole stack runs in one call without the interpreter lock."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, max_length: int) -> None:
        self.shape = config.shape
        self.dtype = dtype
        self.kernels = f"native-{isa()}"
        self._config = config
        library = load()
        assert library is not None
        self._library = library
        self._embed = PackedLinear(self.shape.vocab_size, config.hidden, dtype)
        self._head = self._embed if config.tied else PackedLinear(self.shape.vocab_size, config.hidden, dtype)
        self._layers = [_Layer(config, dtype) for _ in range(self.shape.num_layers)]
        self._final_norm = torch.ones(config.hidden)
        self._cos, self._sin = rope_tables(config, max_length)
        self._c_layers = (CLayer * self.shape.num_layers)()
        self._c = self._c_model()
        self._cache: PagedKVCache | None = None
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
        shape = self.shape
        return NativeKVCache(
            shape.num_layers, num_blocks, block_size, shape.kv_heads, shape.head_dim, self.dtype, torch.device("cpu")
        )

    def forward(self, batch: RaggedBatch, cache: PagedKVCache) -> Tensor:
        self._bind(cache)
        hidden = torch.empty(batch.num_tokens, self._config.hidden)
        c = c_batch(batch)
        self._library.slip_forward(
            ctypes.byref(self._c), ctypes.byref(c), address(hidden), self._memory(batch.num_tokens)
        )
        return hidden

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

    def _memory(self, tokens: int) -> int:
        """Scratch for a step of this many tokens; grows and stays."""
        size = self._library.slip_workspace_bytes(ctypes.byref(self._c), tokens)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()

    def _bind(self, cache: PagedKVCache) -> None:
        if cache is self._cache:
            return
        for layer, (keys, values) in zip(self._c_layers, cache.data, strict=True):
            layer.k_cache, layer.v_cache = address(keys), address(values)
        self._cache = cache

    def _fill(self, name: str, tensor: Tensor) -> None:
        """Copies one Hugging Face tensor to its place; projections share panels (q, k, v; gate, up)."""
        match name.split("."):
            case ["model", "embed_tokens", "weight"]:
                self._embed.fill(tensor)
            case ["lm_head", "weight"]:
                self._head.fill(tensor)
            case ["model", "norm", "weight"]:
                self._final_norm.copy_(tensor)
            case ["model", "layers", index, *rest]:
                self._fill_layer(self._layers[int(index)], rest, tensor)

    def _fill_layer(self, layer: _Layer, name: list[str], tensor: Tensor) -> None:
        head_dim = self.shape.head_dim
        k_panel = self._config.heads * head_dim // PANEL
        v_panel = k_panel + self.shape.kv_heads * head_dim // PANEL
        places: dict[str, tuple[PackedLinear, int, int]] = {
            "q_proj": (layer.qkv, 0, 1),
            "k_proj": (layer.qkv, k_panel, 1),
            "v_proj": (layer.qkv, v_panel, 1),
            "o_proj": (layer.out, 0, 1),
            "gate_proj": (layer.gate_up, 0, 2),
            "up_proj": (layer.gate_up, 1, 2),
            "down_proj": (layer.down, 0, 1),
        }
        norms: dict[str, Any] = {
            "input_layernorm": layer.attn_norm,
            "post_attention_layernorm": layer.mlp_norm,
            "q_norm": layer.q_norm,
            "k_norm": layer.k_norm,
        }
        module, kind = name[-2], name[-1]
        if module in norms:
            norms[module].copy_(tensor)
        else:
            linear, first, stride = places[module]
            (linear.fill if kind == "weight" else linear.fill_bias)(tensor, first, stride)

    def _c_model(self) -> CModel:
        config = self._config
        for c, layer, window in zip(self._c_layers, self._layers, config.windows, strict=True):
            c.qkv, c.out, c.gate_up, c.down = layer.qkv.c, layer.out.c, layer.gate_up.c, layer.down.c
            c.attn_norm, c.mlp_norm = address(layer.attn_norm), address(layer.mlp_norm)
            c.q_norm, c.k_norm = address(layer.q_norm), address(layer.k_norm)
            c.window = window
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
            lm_head=self._head.c,
            final_norm=address(self._final_norm),
        )
