"""The forward pass of an EAGLE-3 head over the paged cache, with compiled kernels and in plain torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.drafter.head.layout import LAYER, HeadConfig
from slipstream.engine.models.config import rope_tables
from slipstream.engine.models.native_decoder import NativeDecoder
from slipstream.engine.models.native_layer import NativeLayer
from slipstream.engine.models.torch_decoder import TorchDecoder
from slipstream.engine.speculation.protocol import DraftHost
from slipstream.kernels import reference
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache, TorchKVCache
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.native.library import DTYPE_CODES, CLayer, CModel, address, c_batch, load
from slipstream.kernels.native.linear import PackedLinear


class HeadNetwork(Protocol):
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies weights in, in place."""

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [n, taps, hidden] as the head reads them, [n, hidden] float32."""

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden] float32 from the tokens of the batch and what came before each of them, ``hidden``.

        Position p holds token p + 1 and the features of position p (or the head's own output there), and predicts
        token p + 2. Writes the head's keys and values; may overwrite ``hidden``.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary] float32; valid until the next call."""

    @property
    def cache(self) -> PagedKVCache:
        """The head's keys and values."""


def make_network(config: HeadConfig, host: DraftHost) -> HeadNetwork:
    """With the target's embeddings; the drafter has refused other models before."""
    if isinstance(host.model, NativeDecoder):
        return NativeHead(config, host.model, host)
    assert isinstance(host.model, TorchDecoder)
    return TorchHead(config, host.model, host)


class NativeHead:
    def __init__(self, config: HeadConfig, target: NativeDecoder, host: DraftHost) -> None:
        decoder = config.as_decoder(target.config)
        library = load()
        assert library is not None
        self._library = library
        self._fc = PackedLinear(config.hidden, len(config.taps) * config.hidden, target.dtype)
        self._layer = NativeLayer(decoder, target.dtype, reads_embedding=True)
        self._lm_head = PackedLinear(config.draft_vocab_size, config.hidden, target.dtype)
        self._norm = torch.ones(config.hidden)
        self._cos, self._sin = rope_tables(decoder, host.block_tables.shape[1] * host.block_size)
        self.cache: PagedKVCache = NativeKVCache(
            1, host.num_blocks, host.block_size, config.kv_heads, config.head_dim, target.dtype, torch.device("cpu")
        )
        self._c_layers = (CLayer * 1)()
        self._layer.describe(self._c_layers[0], 0)
        keys, values = self.cache.data[0]
        self._c_layers[0].k_cache, self._c_layers[0].v_cache = address(keys), address(values)
        self._c = CModel(
            dtype=DTYPE_CODES[target.dtype],
            hidden=config.hidden,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate,
            num_layers=1,
            norm_eps=config.norm_eps,
            rope_cos=address(self._cos),
            rope_sin=address(self._sin),
            layers=self._c_layers,
            embed=target.embedding.c,
            lm_head=self._lm_head.c,
            final_norm=address(self._norm),
            given_hidden=1,
        )
        self._vocab = config.draft_vocab_size
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._fc.fill(tensors["fc.weight"])
        self._lm_head.fill(tensors["lm_head.weight"])
        self._norm.copy_(tensors["norm.weight"])
        for name, tensor in tensors.items():
            if name.startswith(LAYER):
                self._layer.fill(name.removeprefix(LAYER).split("."), tensor)

    def fuse(self, features: Tensor) -> Tensor:
        return self._fc(features.flatten(1))

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        c = c_batch(batch)
        self._library.slip_forward(ctypes.byref(self._c), ctypes.byref(c), address(hidden), self._memory(len(hidden)))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), dtype=torch.int32)
        out = torch.empty(len(hidden), self._vocab)
        self._library.slip_logits(
            *(ctypes.byref(self._c), address(hidden), address(rows), len(rows), address(out), self._vocab),
            self._memory(len(rows)),
        )
        return out

    def _memory(self, tokens: int) -> int:
        size = self._library.slip_workspace_bytes(ctypes.byref(self._c), tokens)
        if size > self._workspace.numel():
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()


class TorchHead:
    """Specifies what the compiled head computes; runs on every device."""

    def __init__(self, config: HeadConfig, target: TorchDecoder, host: DraftHost) -> None:
        self._config = config
        self._device, self._dtype = target.device, target.dtype
        self._embedding = target.embedding
        self._weights = {
            name: torch.empty(shape, dtype=self._dtype, device=self._device)
            for name, shape in config.shapes.items()
            if name not in ("d2t", "t2d")
        }
        decoder = config.as_decoder(target.config)
        length = host.block_tables.shape[1] * host.block_size
        self._cos, self._sin = (table.to(self._device) for table in rope_tables(decoder, length))
        self.cache: PagedKVCache = TorchKVCache(
            1, host.num_blocks, host.block_size, config.kv_heads, config.head_dim, self._dtype, self._device
        )

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(tensors[name])

    def fuse(self, features: Tensor) -> Tensor:
        return functional.linear(features.flatten(1).to(self._dtype), self._weights["fc.weight"]).float()

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        config, weights, eps = self._config, self._weights, self._config.norm_eps
        positions = torch.from_numpy(batch.positions).to(self._device)
        cos, sin = self._cos[positions], self._sin[positions]
        token_ids = torch.from_numpy(batch.token_ids).to(self._device)
        hidden = hidden.to(self._dtype)
        embedding = functional.embedding(token_ids, self._embedding)
        x = torch.cat(
            (
                reference.rms_norm(embedding, weights[LAYER + "input_layernorm.weight"], eps),
                reference.rms_norm(hidden, weights[LAYER + "hidden_norm.weight"], eps),
            ),
            dim=-1,
        )
        q, k, v = (self._linear(f"self_attn.{name}_proj", x).view(len(x), -1, config.head_dim) for name in "qkv")
        self.cache.store(0, reference.rope(k, cos, sin), v, batch)
        values = self.cache.attend(0, reference.rope(q, cos, sin), batch, config.head_dim**-0.5)
        hidden = hidden + self._linear("self_attn.o_proj", values.flatten(1))
        x = reference.rms_norm(hidden, weights[LAYER + "post_attention_layernorm.weight"], eps)
        inner = reference.silu_mul(self._linear("mlp.gate_proj", x), self._linear("mlp.up_proj", x))
        return (hidden + self._linear("mlp.down_proj", inner)).float()

    def logits(self, hidden: Tensor) -> Tensor:
        x = reference.rms_norm(hidden.to(self._dtype), self._weights["norm.weight"], self._config.norm_eps)
        return functional.linear(x, self._weights["lm_head.weight"]).float()

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._weights[f"{LAYER}{name}.weight"])
