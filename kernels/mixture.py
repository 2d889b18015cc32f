"""The weights of a mixture of gated networks: those of all experts in one piece, as kernels read them, or each matrix
by itself, as it came."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from slipstream.kernels import ops
from slipstream.kernels.compute import Compute, LayerShape
from slipstream.kernels.reference import mixed, route
from slipstream.kernels.weight import Weight

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


class ExpertMatrices:
    """The same with a ``Weight`` for each matrix of each expert."""

    def __init__(self, shape: LayerShape, make: Compute) -> None:
        assert shape.mixture is not None
        self.settings = shape.mixture
        inner, hidden = self.settings.intermediate, shape.hidden
        sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.router = make.weight(self.settings.experts, hidden)
        self._experts = [
            {matrix: make.weight(n, k, module=f"{matrix}_proj") for matrix, (n, k) in sizes.items()}
            for _ in range(self.settings.experts)
        ]

    @property
    def matrices(self) -> dict[str, Weight]:
        """By their names in the layer, without ``.weight``."""
        found = {"mlp.gate": self.router}
        for number, expert in enumerate(self._experts):
            found |= {f"mlp.experts.{number}.{matrix}_proj": weight for matrix, weight in expert.items()}
        return found

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.matrices.values())

    def fill(self, name: str, rows: Tensor, first_row: int = 0) -> bool:
        """False for a tensor of something else."""
        if (weight := self._weight(name)) is None:
            return False
        weight.fill(rows, first_row)
        return True

    def read(self, name: str, rows: Tensor) -> Tensor | None:
        """Rows of a tensor, by indices on the device; None for a tensor of something else."""
        weight = self._weight(name)
        return None if weight is None else weight.rows(rows)

    def _weight(self, name: str) -> Weight | None:
        if (found := NAMES.fullmatch(name)) is None:
            return None
        return self.router if found["expert"] is None else self._experts[int(found["expert"])][found["matrix"]]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, hidden] from x [rows, hidden]."""
        return mixed(x, *route(self.router(x), self.settings.top, self.settings.renormalize), self._network)

    def _network(self, expert: int, rows: Tensor) -> Tensor:
        own = self._experts[expert]
        return own["down"](ops.silu_mul(own["gate"](rows), own["up"](rows)))
