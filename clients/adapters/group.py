"""The trainer's side of a group of two in which it broadcasts weights to a server, with Gloo where there is no NCCL.

It has the methods of the communicators that trainers have of vLLM, so that it can stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore

PACKED_BYTES = 2**30
"""Bytes after which packed tensors are sent; vLLM's default, which the server has, too."""
TIMEOUT_S = 300.0


class TrainerGroup:
    """Rank 0 of a group that waits at an address for the server. It is there when the server has joined."""

    def __init__(self, address: str, port: int, world_size: int, timeout_s: float = TIMEOUT_S) -> None:
        """``address`` and ``port`` are what the server is told. Raises RuntimeError if it does not come in time."""
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(address, port, world_size, is_master=True, timeout=timeout)
        host = f"[{address}]" if ":" in address else address
        named = PrefixStore(f"tcp://{host}:{port}", store)
        self._gloo: Any = dist.ProcessGroupGloo(named, 0, world_size, timeout=timeout)
        self.group = SimpleNamespace(store=store, socket=None, barrier=self.barrier)
        """Trainers let go of the store by it, and wait for others."""

    def broadcast(self, tensor: Tensor, src: int = 0, stream: Any = None) -> None:
        """Sends a tensor, from wherever it is. ``src`` and ``stream`` mean nothing here: this side sends."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._gloo.broadcast([tensor.detach().contiguous().cpu()], options).wait()

    def barrier(self) -> None:
        self._gloo.barrier(dist.BarrierOptions()).wait()


def send_packed(
    iterator: Iterable[tuple[str, Tensor]],
    group: TrainerGroup,
    src: int = 0,
    post_iter_func: Callable[[tuple[str, Tensor]], Tensor] = lambda item: item[1],
    buffer_size_bytes: int = PACKED_BYTES,
    num_buffers: int = 1,
) -> None:
    """Broadcasts tensors as bytes behind each other, as many together as it takes to have more than the buffer.

    The signature is that of vLLM's ``packed_nccl_broadcast_producer``.
    """
    for parts in _together(iterator, post_iter_func, buffer_size_bytes):
        group.broadcast(torch.cat(parts))


def _together(
    iterator: Iterable[tuple[str, Tensor]], chosen: Callable[[tuple[str, Tensor]], Tensor], most: int
) -> Iterator[list[Tensor]]:
    parts: list[Tensor] = []
    size = 0
    for item in iterator:
        parts.append(chosen(item).detach().contiguous().view(-1).view(torch.uint8).cpu())
        size += parts[-1].numel()
        if size > most:
            yield parts
            parts, size = [], 0
    if parts:
        yield parts
