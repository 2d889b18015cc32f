"""The Llama family in plain torch: runs on every device, and specifies what the fast paths compute."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from slipstream.engine.models.config import DecoderConfig, cache_shape, rope_tables
from slipstream.engine.models.protocol import DecoderModel, Forward
from slipstream.engine.models.weights import WeightSlots
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import AttentionPlan, PagedKVCache, TorchKVCache


class TorchDecoder:
    """Parameters by their Hugging Face names; the arithmetic follows transformers operation by operation."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, max_length: int) -> None:
        self.shape = config.shape
        self.switch_length = 0
        self.dtype = dtype
        self.kernels = f"torch-{device.type}"
        self._config = config
        self._device = device
        self._weights = {
            name: torch.empty(size, dtype=dtype, device=device) for name, size in config.parameters.items()
        }
        self._cos, self._sin = (table.to(device) for table in rope_tables(config, max_length))

    @property
    def decoder(self) -> DecoderModel:
        return self

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        slots = WeightSlots(self._config.parameters)
        for name, tensor in tensors:
            if slots.take(name, tensor):
                self._weights[name].copy_(tensor)
        slots.check_complete()

    @property
    def config(self) -> DecoderConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return self._device

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the output matrix reads of the last layer's output [n, hidden]."""
        return ops.rms_norm(hidden, self._weights["model.norm.weight"], self._config.norm_eps)

    @property
    def head(self) -> Tensor:
        """The output matrix [vocab, hidden]."""
        return self._weights["model.embed_tokens.weight" if self._config.tied else "lm_head.weight"]

    @property
    def embedding(self) -> Tensor:
        """The token embeddings [vocab, hidden]."""
        return self._weights["model.embed_tokens.weight"]

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        return TorchKVCache(cache_shape(self.shape, block_size, self.dtype), num_blocks, self._device)

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        positions = torch.from_numpy(batch.positions).to(self._device)
        cos, sin = self._cos[positions], self._sin[positions]
        token_ids = torch.from_numpy(batch.token_ids).to(self._device)
        hidden = ops.embedding(token_ids, self._weights["model.embed_tokens.weight"])
        attention = cache.plan(batch)
        tapped = []
        for layer in range(self.shape.num_layers):
            if layer in taps:
                tapped.append(hidden)
            hidden = self._layer(layer, hidden, cos, sin, attention)
        if self.shape.num_layers in taps:
            tapped.append(hidden)
        return Forward(hidden, torch.stack(tapped, dim=1).float() if tapped else None)

    def logits(self, hidden: Tensor, rows: Int32) -> Tensor:
        chosen = hidden[torch.from_numpy(rows).to(self._device, torch.long)]
        return ops.linear(self.final_norm(chosen), self.head).float()

    def _layer(self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor, attention: AttentionPlan) -> Tensor:
        config, prefix = self._config, f"model.layers.{layer}."
        head_dim, eps = self.shape.head_dim, config.norm_eps
        x = ops.rms_norm(hidden, self._weights[prefix + "input_layernorm.weight"], eps)
        q = self._linear(prefix + "self_attn.q_proj", x).view(len(x), -1, head_dim)
        k = self._linear(prefix + "self_attn.k_proj", x).view(len(x), -1, head_dim)
        v = self._linear(prefix + "self_attn.v_proj", x).view(len(x), -1, head_dim)
        if config.qk_norm:
            q = ops.rms_norm(q, self._weights[prefix + "self_attn.q_norm.weight"], eps)
            k = ops.rms_norm(k, self._weights[prefix + "self_attn.k_norm.weight"], eps)
        attention.store(layer, ops.rope(k, cos, sin), v)
        values = attention.attend(layer, ops.rope(q, cos, sin), head_dim**-0.5, config.windows[layer])
        hidden = hidden + self._linear(prefix + "self_attn.o_proj", values.flatten(1))
        x = ops.rms_norm(hidden, self._weights[prefix + "post_attention_layernorm.weight"], eps)
        gate, up = self._linear(prefix + "mlp.gate_proj", x), self._linear(prefix + "mlp.up_proj", x)
        return hidden + self._linear(prefix + "mlp.down_proj", ops.silu_mul(gate, up))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return ops.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))
