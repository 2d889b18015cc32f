"""The weights of one decoder layer as panels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from slipstream.engine.models.config import DecoderConfig
from slipstream.kernels.native.library import CLayer, address
from slipstream.kernels.native.linear import PANEL, PackedLinear, panels_elems

Reads = Literal["normed", "both", "plain"]
"""What the attention reads: the hidden state behind a norm; [embedding of the token, hidden state], each behind a norm
of its own; or the hidden state as it is."""


class NativeLayer:
    """Projections that run together share their panels: q, k and v; gate and up, in turn."""

    def __init__(
        self, config: DecoderConfig, dtype: torch.dtype, reads: Reads = "normed", memory: Tensor | None = None
    ) -> None:
        """``memory`` [num_elems(config)] for the matrices; without it each has its own."""
        hidden, head_dim = config.hidden, config.shape.head_dim
        sizes = _sizes(config, reads)
        elems = [panels_elems(n, k) for n, k, _ in sizes]
        parts = torch.split(memory, elems) if memory is not None else [None] * len(sizes)
        self.qkv, self.out, self.gate_up, self.down = (
            PackedLinear(n, k, dtype, bias, part) for (n, k, bias), part in zip(sizes, parts, strict=True)
        )
        self.attn_norm = torch.ones(hidden) if reads != "plain" else None
        self.embed_norm = torch.ones(hidden) if reads == "both" else None
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
            "input_layernorm": self.embed_norm if reads == "both" else self.attn_norm,
            "hidden_norm": self.attn_norm,
            "post_attention_layernorm": self.mlp_norm,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }

    @staticmethod
    def num_elems(config: DecoderConfig) -> int:
        return sum(panels_elems(n, k) for n, k, _ in _sizes(config))

    def fill(self, name: list[str], tensor: Tensor, first_row: int = 0) -> None:
        """Copies one tensor to its place; ``name`` is its Hugging Face name within the layer, split at the dots.

        A part of a matrix is put where it begins, a multiple of PANEL rows.
        """
        module, kind = name[-2], name[-1]
        if module in self._norms:
            self._norms[module].copy_(tensor)
        else:
            linear, first, stride = self._places[module]
            first += stride * (first_row // PANEL)
            (linear.fill if kind == "weight" else linear.fill_bias)(tensor, first, stride)

    def describe(self, c: CLayer, window: int) -> None:
        """Fills in the C struct but for the cache."""
        c.qkv, c.out, c.gate_up, c.down = self.qkv.c, self.out.c, self.gate_up.c, self.down.c
        c.attn_norm, c.mlp_norm, c.embed_norm = map(address, (self.attn_norm, self.mlp_norm, self.embed_norm))
        c.q_norm, c.k_norm = address(self.q_norm), address(self.k_norm)
        c.window = window


def _sizes(config: DecoderConfig, reads: Reads = "normed") -> list[tuple[int, int, bool]]:
    """Outputs, inputs and whether there is a bias, of the matrices in the order in which a step reads them."""
    hidden, inner = config.hidden, config.intermediate
    return [
        (config.qkv_width, (2 if reads == "both" else 1) * hidden, config.qkv_bias),
        (hidden, config.heads * config.shape.head_dim, config.out_bias),
        (2 * inner, hidden, config.mlp_bias),
        (hidden, inner, config.mlp_bias),
    ]
