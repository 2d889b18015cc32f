"""The weights of one decoder layer as panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.kernels.compute import LayerShape
from slipstream.kernels.native.library import CLayer, address
from slipstream.kernels.native.weight import PANEL, Forms, PanelWeight
from slipstream.kernels.stored import Stored


class NativeLayer:
    """Projections that run together share their panels: q, k and v; gate and up, in turn."""

    def __init__(self, shape: LayerShape, matrices: Sequence[PanelWeight]) -> None:
        """``matrices`` of the sizes of ``matrix_shapes``."""
        hidden, head_dim = shape.hidden, shape.head_dim
        self.qkv, self.out, self.gate_up, self.down = self._matrices = matrices
        self.attn_norm = torch.ones(hidden) if shape.reads != "plain" else None
        self.embed_norm = torch.ones(hidden) if shape.reads == "both" else None
        self.mlp_norm = torch.ones(hidden)
        self.q_norm = torch.ones(head_dim) if shape.qk_norm else None
        self.k_norm = torch.ones(head_dim) if shape.qk_norm else None
        self._places: dict[str, tuple[PanelWeight, int, int]] = {
            module: (getattr(self, matrix), first, stride) for module, (matrix, first, stride) in places(shape).items()
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

    @property
    def is_quantised(self) -> bool:
        """Whether some matrix is."""
        return any(weight.is_quantised for weight in self._matrices)

    @property
    def num_bytes(self) -> int:
        matrices = sum(weight.num_bytes for weight in self._matrices)
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

    def kept(self, name: str, rows: Tensor) -> Tensor | Stored:
        """As ``read``; what is quantised, as it is kept."""
        *_, module, kind = name.split(".")
        if module in self._norms or kind == "bias":
            return self.read(name, rows)
        weight, first, stride = self._places[module]
        return weight.kept(rows, first, stride)

    @property
    def forms(self) -> tuple[Forms, ...]:
        """Those of each matrix; to be told to another layer by ``take_forms``."""
        return tuple(weight.forms for weight in self._matrices)

    def take_forms(self, forms: tuple[Forms, ...]) -> None:
        for weight, each in zip(self._matrices, forms, strict=True):
            weight.take_forms(each)

    def widen(self, name: str) -> None:
        """As ``PanelWeight.widen`` of the matrix that a tensor is in."""
        *_, module, _ = name.split(".")
        if module in self._places:
            self._places[module][0].widen()

    def describe(self, c: CLayer, window: int) -> None:
        """Fills in the C struct but for the cache."""
        c.qkv, c.out, c.gate_up, c.down = self.qkv.c, self.out.c, self.gate_up.c, self.down.c
        c.attn_norm, c.mlp_norm, c.embed_norm = map(address, (self.attn_norm, self.mlp_norm, self.embed_norm))
        c.q_norm, c.k_norm = address(self.q_norm), address(self.k_norm)
        c.window = window


def places(shape: LayerShape) -> dict[str, tuple[str, int, int]]:
    """Where a matrix of files is, by the last part of its name: in which of a layer, its first panel there, and how
    many panels further the next one is."""
    k_panel = shape.heads * shape.head_dim // PANEL
    v_panel = k_panel + shape.kv_heads * shape.head_dim // PANEL
    return {
        "q_proj": ("qkv", 0, 1),
        "k_proj": ("qkv", k_panel, 1),
        "v_proj": ("qkv", v_panel, 1),
        "o_proj": ("out", 0, 1),
        "gate_proj": ("gate_up", 0, 2),
        "up_proj": ("gate_up", 1, 2),
        "down_proj": ("down", 0, 1),
    }


@dataclass(frozen=True, slots=True)
class MatrixShape:
    n: int
    k: int
    bias: bool
    modules: tuple[str, ...]
    """The matrices that lie behind each other in it, by the last parts of their names; gate stands for up, too."""
    segments: tuple[int, ...] = (0,)
    """Their first panels."""


def matrix_shapes(shape: LayerShape) -> list[MatrixShape]:
    """In the order in which a step reads them."""
    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv = (0, q_width // PANEL, (q_width + kv_width) // PANEL)
    return [
        MatrixShape(q_width + 2 * kv_width, shape.input_width, shape.qkv_bias, ("q_proj", "k_proj", "v_proj"), qkv),
        MatrixShape(shape.hidden, q_width, shape.out_bias, ("o_proj",)),
        MatrixShape(2 * shape.intermediate, shape.hidden, shape.mlp_bias, ("gate_proj",)),
        MatrixShape(shape.hidden, shape.intermediate, shape.mlp_bias, ("down_proj",)),
    ]
