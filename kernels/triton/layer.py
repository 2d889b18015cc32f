"""The weights of one decoder layer as a GPU reads them: matrices that share their input are one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from slipstream.kernels.compute import PACKED, Compute, LayerShape
from slipstream.kernels.mixture import MixtureWeights
from slipstream.kernels.triton.grouped import JoinedWeight
from slipstream.kernels.weight import Weight


class Matrix(Protocol):
    """What a layer computes with."""

    @property
    def num_bytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def _joined(make: Compute, modules: dict[str, int], k: int, bias: bool) -> tuple[Matrix, list[tuple[Weight, int]]]:
    """Matrices that share their input as one; and where each of them is filled, a weight and its first row there.

    ``modules`` are their widths, by the last parts of their names. They are one in memory, too, unless they are packed,
    where each has a form of its own.
    """
    if make.formats.weights == PACKED:
        parts = [make.weight(n, k, bias, name) for name, n in modules.items()]
        return JoinedWeight(parts), [(part, 0) for part in parts]
    widths = list(modules.values())
    whole = make.weight(sum(widths), k, bias)
    return whole, [(whole, sum(widths[:at])) for at in range(len(widths))]


class FusedLayer:
    """Filled by Hugging Face's names, whose tensors are rows of the fused matrices."""

    def __init__(self, shape: LayerShape, make: Compute) -> None:
        hidden, inner = shape.hidden, shape.intermediate
        self.q_width, self.kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        widths = {"q_proj": self.q_width, "k_proj": self.kv_width, "v_proj": self.kv_width}
        self._is_joined = make.formats.weights != PACKED
        self.qkv, (q, k, v) = _joined(make, widths, shape.input_width, shape.qkv_bias)
        self.out = make.weight(hidden, self.q_width, shape.out_bias, "o_proj")
        self.mixture = None if shape.mixture is None else MixtureWeights(shape, make)
        self.gate_up: Matrix | None = None
        self.down: Weight | None = None
        gate = up = down = None
        if self.mixture is None:
            self.gate_up, (gate, up) = _joined(make, {"gate_proj": inner, "up_proj": inner}, hidden, shape.mlp_bias)
            self.down = make.weight(hidden, inner, shape.mlp_bias, "down_proj")
            down = self.down, 0
        self.attn_norm = make.norm(hidden) if shape.reads != "plain" else None
        self.embed_norm = make.norm(hidden) if shape.reads == "both" else None
        self.mlp_norm = make.norm(hidden)
        self.q_norm = make.norm(shape.head_dim) if shape.qk_norm else None
        self.k_norm = make.norm(shape.head_dim) if shape.qk_norm else None
        self.out_norm = make.norm(hidden) if shape.is_gemma else None
        self.down_norm = make.norm(hidden) if shape.is_gemma else None
        places: dict[str, tuple[Weight, int] | None] = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": (self.out, 0)}
        places |= {"gate_proj": gate, "up_proj": up, "down_proj": down}
        self._places = {name: place for name, place in places.items() if place is not None}
        norms = {
            # A layer that reads embeddings calls their norm the input's.
            "input_layernorm": self.embed_norm if shape.reads == "both" else self.attn_norm,
            "hidden_norm": self.attn_norm,
            "post_attention_layernorm": self.out_norm if shape.is_gemma else self.mlp_norm,
            "pre_feedforward_layernorm": self.mlp_norm,
            "post_feedforward_layernorm": self.down_norm,
            "q_norm": self.q_norm,
            "k_norm": self.k_norm,
        }
        self._norms = {name: norm for name, norm in norms.items() if norm is not None}

    @property
    def matrices(self) -> Mapping[str, Weight]:
        """Those that are in memory by themselves, as packed ones are."""
        found = {} if self._is_joined else self._places
        return {("self_attn." if name[0] in "qkvo" else "mlp.") + name: weight for name, (weight, _) in found.items()}

    @property
    def num_bytes(self) -> int:
        parts = (self.qkv, self.out, self.gate_up, self.down, self.mixture)
        matrices = sum(part.num_bytes for part in parts if part is not None)
        return matrices + sum(norm.nbytes for norm in {id(norm): norm for norm in self._norms.values()}.values())

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> None:
        if self.mixture is not None and self.mixture.fill(name, rows, first_row):
            return
        *_, module, kind = name.split(".")
        if module in self._norms:
            self._norms[module][first_row : first_row + len(rows)].copy_(rows)
            return
        weight, place = self._places[module]
        (weight.fill_bias if kind == "bias" else weight.fill)(rows, place + first_row)

    def read(self, name: str, rows: Tensor) -> Tensor:
        if self.mixture is not None and (found := self.mixture.read(name, rows)) is not None:
            return found
        *_, module, kind = name.split(".")
        if module in self._norms:
            return self._norms[module][rows]
        weight, place = self._places[module]
        return (weight.biases if kind == "bias" else weight.rows)(place + rows)
