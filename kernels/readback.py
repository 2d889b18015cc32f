"""Results on their way from a device to the host, and numbers on their way there, for which nobody waits."""

from __future__ import annotations

import time
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """Numbers of the host on the device: a copy of them goes there behind what the device was given before.

    From memory that is not pinned, a GPU's host would wait until all of that is done.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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


class Stopwatch:
    """Seconds that a device takes for what it is given between two moments."""

    def __init__(self, device: torch.device) -> None:
        """The first moment."""
        self._is_apart = device.type == "cuda"
        self._began: Any = self._now()
        self._ended: Any = None

    def stop(self) -> None:
        """The second one."""
        self._ended = self._now()

    @property
    def seconds(self) -> float:
        """To be asked for once the device is beyond both."""
        taken = self._began.elapsed_time(self._ended) / 1000 if self._is_apart else self._ended - self._began
        return float(taken)

    def _now(self) -> Any:
        if not self._is_apart:
            return time.perf_counter()
        moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        moment.record()
        return moment
