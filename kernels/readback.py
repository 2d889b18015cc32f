"""Results on their way from a device to the host, which later work of the device does not hold up."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """One copy to the host, behind the work that was given to the device before; nobody waits until ``wait``."""

    def __init__(self, tensor: Tensor) -> None:
        # To memory that is pinned: torch takes it where a copy from a GPU is not waited for.
        self._host = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tensor:
        """The tensor on the host, once it is there; what the device was given later may go on."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
