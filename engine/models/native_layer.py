"""The weights of one decoder layer as panels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slipstream.engine.models.config import DecoderConfig
from slipstream.kernels.native.library import CLayer, address
from slipstream.kernels.native.linear import PANEL, PackedLinear


class NativeLayer:
    """Projections that run together share their panels: q, k and v; gate and up, in turn.

    With ``reads_embedding`` the attention reads [embedding of the token, hidden], each with a norm of its own.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, reads_embedding: bool = False) -> None:
        hidden, inner = config.hidden, config.intermediate
        head_dim = config.shape.head_dim
        self.qkv = PackedLinear(config.qkv_width, (1 + reads_embedding) * hidden, dtype, config.qkv_bias)
        self.out = PackedLinear(hidden, config.heads * head_dim, dtype, config.out_bias)
        self.gate_up = PackedLinear(2 * inner, hidden, dtype, config.mlp_bias)
        self.down = PackedLinear(hidden, inner, dtype, config.mlp_bias)
        self.attn_norm = torch.ones(hidden)
        self.embed_norm = torch.ones(hidden) if reads_embedding else None
        self.mlp_norm = torch.ones(hidden)
        self.q_norm = torch.ones(head_dim) if config.qk_norm else None
        self.k_norm = torch.ones(head_dim) if config.qk_norm else None
        k_panel = config.heads * head_dim // PANEL
        v_panel = k_panel + config.shape.kv_heads * head_dim // PANEL
        self._places: dict[str, tuple[PackedLinear, int, int]] = {
            "q_proj": (self.qkv, 0, 1),
            "k_proj": (self.qkv, k_panel, 1),
            "v_proj": (self.qkv, v_panel, 1),
            "o_proj": (self.out, 0, 1),
            "gate_proj": (self.gate_up, 0, 2),
            "up_proj": (self.gate_up, 1, 2),
            "down_proj": (self.down, 0, 1),
        }
        self._norms: dict[str, Any] = {
            # A layer that reads embeddings calls their norm the input's.
            "input_layernorm": self.embed_norm if reads_embedding else self.attn_norm,
            "hidden_norm": self.attn_norm,
            "post_attention_layernorm": self.mlp_norm,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }

    def fill(self, name: list[str], tensor: Tensor) -> None:
        """Copies one tensor to its place; ``name`` is its Hugging Face name within the layer, split at the dots."""
        module, kind = name[-2], name[-1]
        if module in self._norms:
            self._norms[module].copy_(tensor)
        else:
            linear, first, stride = self._places[module]
            (linear.fill if kind == "weight" else linear.fill_bias)(tensor, first, stride)

    def describe(self, c: CLayer, window: int) -> None:
        """Fills in the C struct but for the cache."""
        c.qkv, c.out, c.gate_up, c.down = self.qkv.c, self.out.c, self.gate_up.c, self.down.c
        c.attn_norm, c.mlp_norm, c.embed_norm = map(address, (self.attn_norm, self.mlp_norm, self.embed_norm))
        c.q_norm, c.k_norm = address(self.q_norm), address(self.k_norm)
        c.window = window
