"""The Muon optimizer, with little arithmetic, in the number format that the processor multiplies matrices fastest in.

``torch.optim.Muon`` orthogonalizes whole matrices in bfloat16 and five iterations wherever it runs. On a CPU without
BF16 instructions that alone was more than four fifths of a training step; with them it was more than half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slipstream.drafter.training.threads import Threads

COEFFICIENTS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
"""For x, x³ and x⁵ in each iteration: what brings singular values between 0.01 and 1 nearest to one by three odd
polynomials of the fifth degree, each chosen after the one before (Amsel et al. 2025, Polar Express)."""
BLOCK = 192
"""Rows that are made orthogonal to each other; other rows need not be (Khaled et al. 2025, MuonBP). The arithmetic
grows with their number: for a matrix of 576 rows this is a third of it."""
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum of each matrix (Jordan et al. 2024), with Nesterov's look ahead.

    Updates have the size of AdamW's (Liu et al. 2025), so that one learning rate fits both. The state is that of
    ``torch.optim.Muon``.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        threads: Threads | None = None,
        between: Callable[[], object] = lambda: None,
    ) -> None:
        """``dtype`` is what matrices are orthogonalized in; the result is rough in any case. ``between`` is called
        before each matrix."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype
        self._threads = threads or Threads()
        self._between = between

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        every = [
            (group, weight) for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        # The largest first, so that no thread is left with it at the end.
        every.sort(key=lambda each: each[1].numel(), reverse=True)
        self._threads.map(lambda each: self._update(*each), every)

    @torch.no_grad()
    def _update(self, group: dict[str, Any], weight: Tensor) -> None:
        self._between()
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"]
        assert weight.grad is not None
        momentum.lerp_(weight.grad, 1 - group["momentum"])
        update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]), self._dtype)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-0.2 * math.sqrt(max(weight.shape)) * group["lr"])


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [m, n] with all singular values of each block near one (0.7 to 1.3), by a Newton-Schulz iteration.

    A block is ``BLOCK`` rows, of a matrix with fewer columns than rows so many columns. Singular values below a
    hundredth of the block's norm come less near.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = torch.cat([_orthogonalize(block) for block in torch.split(x, BLOCK)])
    return x if wide else x.T


def _orthogonalize(x: Tensor) -> Tensor:
    x = x / x.norm().clamp_min(LEAST_NORM)  # no singular value is more than one
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
