"""The weights of one decoder layer as panels."""

from __future__ import annotations

import torch
from torch import Tensor

from slipstream.kernels.compute import LayerShape
from slipstream.kernels.native.library import CLayer, address
from slipstream.kernels.native.weight import PANEL, PackedWeight, panels_elems


class NativeLayer:
    """Projections that run together share their panels: q, k and v; gate and up, in turn."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, memory: Tensor) -> None:
        """``memory`` [num_elems(shape)] for the matrices."""
        hidden, head_dim = shape.hidden, shape.head_dim
        sizes = _sizes(shape)
        parts = torch.split(memory, [panels_elems(n, k) for n, k, _ in sizes])
        self.qkv, self.out, self.gate_up, self.down = (
            PackedWeight(n, k, dtype, bias, part) for (n, k, bias), part in zip(sizes, parts, strict=True)
        )
        self.attn_norm = torch.ones(hidden) if shape.reads != "plain" else None
        self.embed_norm = torch.ones(hidden) if shape.reads == "both" else None
        self.mlp_norm = torch.ones(hidden)
        self.q_norm = torch.ones(head_dim) if shape.qk_norm else None
        self.k_norm = torch.ones(head_dim) if shape.qk_norm else None
        k_panel = shape.heads * head_dim // PANEL
        v_panel = k_panel + shape.kv_heads * head_dim // PANEL
        self._places: dict[str, tuple[PackedWeight, int, int]] = {
            "q_proj": (self.qkv, 0, 1),
            "k_proj": (self.qkv, k_panel, 1),
            "v_proj": (self.qkv, v_panel, 1),
            "o_proj": (self.out, 0, 1),
            "gate_proj": (self.gate_up, 0, 2),
            "up_proj": (self.gate_up, 1, 2),
            "down_proj": (self.down, 0, 1),
        }
        norms = {
            # A layer that reads embeddings calls their norm the input's.
            "input_layernorm": self.embed_norm if shape.reads == "both" else self.attn_norm,
            "hidden_norm": self.attn_norm,
            "post_attention_layernorm": self.mlp_norm,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }
        self._norms = {name: norm for name, norm in norms.items() if norm is not None}

    @staticmethod
    def num_elems(shape: LayerShape) -> int:
        return sum(panels_elems(n, k) for n, k, _ in _sizes(shape))

    @property
    def num_bytes(self) -> int:
        matrices = sum(weight.num_bytes for weight in (self.qkv, self.out, self.gate_up, self.down))
        return matrices + sum(norm.nbytes for norm in {id(norm): norm for norm in self._norms.values()}.values())

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        *_, module, kind = name.split(".")
        if module in self._norms:
            self._norms[module][first_row : first_row + len(rows)].copy_(rows)
        else:
            weight, first, stride = self._places[module]
            (weight.fill_bias if kind == "bias" else weight.fill)(rows, first_row, first, stride)

    def read(self, name: str, rows: Tensor) -> Tensor:
        *_, module, kind = name.split(".")
        if module in self._norms:
            return self._norms[module][rows]
        weight, first, stride = self._places[module]
        return (weight.biases if kind == "bias" else weight.rows)(rows, first, stride)

    def describe(self, c: CLayer, window: int) -> None:
        """Fills in the C struct but for the cache."""
        c.qkv, c.out, c.gate_up, c.down = self.qkv.c, self.out.c, self.gate_up.c, self.down.c
        c.attn_norm, c.mlp_norm, c.embed_norm = map(address, (self.attn_norm, self.mlp_norm, self.embed_norm))
        c.q_norm, c.k_norm = address(self.q_norm), address(self.k_norm)
        c.window = window


def _sizes(shape: LayerShape) -> list[tuple[int, int, bool]]:
    """Outputs, inputs and whether there is a bias, of the matrices in the order in which a step reads them."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        (q_width + 2 * kv_width, shape.input_width, shape.qkv_bias),
        (shape.hidden, q_width, shape.out_bias),
        (2 * shape.intermediate, shape.hidden, shape.mlp_bias),
        (shape.hidden, shape.intermediate, shape.mlp_bias),
    ]
