"""The weights of a mixture of gated networks: those of all experts in one piece, as kernels read them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.compute import Compute, LayerShape

NAMES = re.compile(r"mlp\.(?:gate|experts\.(?P<expert>\d+)\.(?P<matrix>gate|up|down)_proj)\.weight")
"""Tensors of a layer that belong to its mixture."""


class MixtureWeights:
    """Filled by Hugging Face's names; dense, in the format of activations."""

    def __init__(self, shape: LayerShape, make: Compute) -> None:
        assert shape.mixture is not None
        self.settings = shape.mixture
        count, inner, hidden = self.settings.experts, self.settings.intermediate, shape.hidden
        dtype = make.formats.compute
        self.router = make.weight(count, hidden)
        self.gate_up = torch.empty(count, 2 * inner, hidden, dtype=dtype, device=make.device)
        self.down = torch.empty(count, hidden, inner, dtype=dtype, device=make.device)

    @property
    def num_bytes(self) -> int:
        return self.router.num_bytes + self.gate_up.nbytes + self.down.nbytes

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> bool:
        """False for a tensor of something else."""
        if (found := NAMES.fullmatch(name)) is None:
            return False
        if found["expert"] is None:
            self.router.fill(rows, first_row)
        else:
            matrix, place = self._place(found)
            matrix[place + first_row : place + first_row + len(rows)].copy_(rows)
        return True

    def read(self, name: str, rows: Tensor) -> Tensor | None:
        """Rows of a tensor, by indices on the device; None for a tensor of something else."""
        if (found := NAMES.fullmatch(name)) is None:
            return None
        if found["expert"] is None:
            return self.router.rows(rows)
        matrix, place = self._place(found)
        return matrix[place + rows]

    def _place(self, found: re.Match[str]) -> tuple[Tensor, int]:
        """The matrix of all that a tensor is a part of, and its first row there."""
        expert = int(found["expert"])
        if found["matrix"] == "down":
            return self.down[expert], 0
        return self.gate_up[expert], self.settings.intermediate if found["matrix"] == "up" else 0

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] from x [rows, hidden]."""
        return ops.experts(x, self.router(x), self.gate_up, self.down, self.settings.top, self.settings.renormalize)
