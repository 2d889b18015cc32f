"""The Muon optimizer, in the number format that the processor multiplies matrices fastest in.

``torch.optim.Muon`` orthogonalizes in bfloat16 wherever it runs. On a CPU without BF16 instructions that alone was more
than four fifths of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slipstream.drafter.training.threads import Threads

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that raises small singular values fastest (Jordan et al. 2024)."""
ITERATIONS = 5
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
    ) -> None:
        """``dtype`` is what matrices are orthogonalized in; the result is rough in any case."""
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype
        self._threads = threads or Threads()

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
    """The matrix [m, n] with all its singular values near one (0.7 to 1.2), by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)
    x = x / x.norm().clamp_min(LEAST_NORM)  # no singular value is more than one
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
