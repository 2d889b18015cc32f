"""Groups of processes in which a trainer broadcasts weights: joined and listened to in threads of their own.

A group is one of torch.distributed's, made without its registry of groups: the trainer's process may have groups of its
own, this process has none that anybody else knows of, and several trainers may come one after the other.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from io import BytesIO
from math import prod
from queue import Empty, Full, Queue, SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from slipstream.engine.background import done
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.operations import JoinGroup, ReceiveTarget, TensorSpec
from slipstream.engine.target.senders import Presence

Batch = list[tuple[str, Tensor]]
MOST_AHEAD = 2
"""Broadcasts that have come and wait to be laid out."""
LOOK_S = 0.1
LEAVE_S = 1.0
"""Time that a group has to be left in when the engine ends."""
MOST_TENSOR_BYTES = 1 << 40


class Collective(Protocol):
    """A group that has been joined."""

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        """Overwrites it with rank 0's. Raises RuntimeError if that fails or takes longer."""

    def barrier(self, timeout_s: float) -> None:
        """Waits until all members have come here."""

    def is_there(self) -> bool:
        """Whether rank 0 answers at the address of the group."""

    def close(self) -> None: ...


class TorchGroup:
    """Gloo or NCCL as torch has them."""

    def __init__(self, asked: JoinGroup, device: torch.device) -> None:
        timeout = timedelta(seconds=asked.timeout_s)
        self._store = _store(asked)
        store: Store = self._store
        if asked.rendezvous == "stateless":
            store = PrefixStore(_uri(asked), store)
        else:
            # What torch's init_process_group puts around a store, inside of what those put around it who make groups
            # beside the default one.
            for prefix in (asked.name, f"{asked.name}/", "cpu/" if asked.backend == "gloo" else "cuda/"):
                store = PrefixStore(prefix, store)
        if asked.backend == "gloo":
            self._group: Any = dist.ProcessGroupGloo(store, asked.rank, asked.world_size, timeout=timeout)
        else:
            torch.cuda.set_device(device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, asked.rank, asked.world_size, options)
        self._is_gloo = asked.backend == "gloo"

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = 0, timedelta(seconds=timeout_s)
        self._wait(self._group.broadcast([tensor], options), timeout_s)

    def barrier(self, timeout_s: float) -> None:
        options = dist.BarrierOptions()
        options.timeout = timedelta(seconds=timeout_s)
        self._wait(self._group.barrier(options), timeout_s)

    def is_there(self) -> bool:
        return _answers(self._store)

    def close(self) -> None:
        if not self._is_gloo:
            self._group.abort()
        self._group = None

    def _wait(self, work: Any, timeout_s: float) -> None:
        work.wait(timedelta(seconds=timeout_s))
        if not self._is_gloo:
            torch.cuda.current_stream().synchronize()


class PlainNccl:
    """NCCL without torch's process groups: its id comes through the store, as vLLM's StatelessProcessGroup hands it on.

    Not proven: it takes two GPUs.
    """

    def __init__(self, asked: JoinGroup, device: torch.device) -> None:
        self._store, self._rank, self._size, self._device = _store(asked), asked.rank, asked.world_size, device
        self._told = 0
        with torch.cuda.device(device):
            nccl: Any = torch.cuda.nccl
            self._comms = [nccl.init_rank(asked.world_size, self._hear(_UniqueId), asked.rank)]
            nccl.all_reduce([torch.zeros(1, device=device)], comms=self._comms)
            torch.cuda.synchronize(device)

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.nccl.broadcast([tensor], 0, comms=self._comms)
            torch.cuda.current_stream().synchronize()

    def barrier(self, timeout_s: float) -> None:
        name = self._hear(_Text)
        self._store.set(f"arrival_{name}_{self._rank}", "1")
        keys = [f"arrival_{name}_{rank}" for rank in range(self._size)]
        self._store.wait(keys, timedelta(seconds=timeout_s))
        self._store.set(f"departure_{name}_{self._rank}", "1")

    def is_there(self) -> bool:
        return _answers(self._store)

    def close(self) -> None:
        self._comms = []

    def _hear(self, unpickler: type[_Text]) -> Any:
        """The next thing that rank 0 tells all others."""
        key, self._told = f"broadcast_from/0/{self._told}", self._told + 1
        return unpickler(BytesIO(self._store.get(key))).load()


class _Text(pickle.Unpickler):
    """Loads what needs no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise ModelError(f"the trainer's group holds a {module}.{name}, which is not loaded")


class _UniqueId(_Text):
    """The bytes of NCCL's id, a struct of ctypes there."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "ncclUniqueId":
            return bytes
        if (module, name) == ("_ctypes", "_unpickle"):
            return lambda _, state: state[1]
        return super().find_class(module, name)


def _store(asked: JoinGroup) -> TCPStore:
    timeout = timedelta(seconds=asked.timeout_s)
    return TCPStore(asked.address.strip("[]"), asked.port, asked.world_size, is_master=False, timeout=timeout)


def _answers(store: TCPStore) -> bool:
    """Whether the process that has made the store, which is rank 0, is there."""
    try:
        store.check(["slipstream"])
    except RuntimeError:
        return False
    return True


def _uri(asked: JoinGroup) -> str:
    host = asked.address.strip("[]")
    return f"tcp://[{host}]:{asked.port}" if ":" in host else f"tcp://{host}:{asked.port}"


class Transfer:
    """What one ``ReceiveTarget`` brings, from the thread of its group to that of the steps."""

    def __init__(self, asked: ReceiveTarget, device: torch.device) -> None:
        self._asked, self._device = asked, device
        self._formats = [_format(spec) for spec in asked.tensors]
        self._came: Queue[Batch | Exception | None] = Queue(MOST_AHEAD)
        self._unwanted = threading.Event()

    def take(self) -> Batch | Exception | None:
        """The next tensors, none at the end, or why there are no more. Raises queue.Empty while nothing has come."""
        return self._came.get_nowait()

    def discard(self) -> None:
        """Nobody takes any more. What the trainer still sends is received, so that the group can go on afterwards."""
        self._unwanted.set()

    def run(self, group: Collective) -> None:
        """In the thread of the group."""
        try:
            for first, last in self._batches():
                self._put(self._receive(group, first, last))
        except Exception as error:
            text = str(error).partition("\n")[0]
            self._put(ModelError(f"the trainer's broadcast in group {self._asked.group!r} broke off: {text}"))
        else:
            self._put(None)

    def _batches(self) -> Iterator[tuple[int, int]]:
        """First and last tensor of each broadcast."""
        first = size = 0
        for at, spec in enumerate(self._asked.tensors):
            size += _num_bytes(spec, self._formats[at])
            if self._asked.buffer_bytes is None or size > self._asked.buffer_bytes:
                yield first, at
                first, size = at + 1, 0
        if first < len(self._asked.tensors):
            yield first, len(self._asked.tensors) - 1

    def _receive(self, group: Collective, first: int, last: int) -> Batch:
        specs, formats = self._asked.tensors[first : last + 1], self._formats[first : last + 1]
        if self._asked.buffer_bytes is None:
            whole = torch.empty(specs[0].shape, dtype=formats[0], device=self._device)
        else:
            size = sum(map(_num_bytes, specs, formats))
            whole = torch.empty(size, dtype=torch.uint8, device=self._device)
        group.broadcast(whole, self._asked.timeout_s)
        if self._asked.barrier:
            group.barrier(self._asked.timeout_s)
        return [(specs[0].name, whole)] if self._asked.buffer_bytes is None else list(unpacked(whole, specs, formats))

    def _put(self, came: Batch | Exception | None) -> None:
        while not self._unwanted.is_set():
            try:
                return self._came.put(came, timeout=LOOK_S)
            except Full:
                continue


def unpacked(
    whole: Tensor, specs: Sequence[TensorSpec], formats: Sequence[torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors that lie behind each other in bytes."""
    begin = 0
    for spec, dtype in zip(specs, formats, strict=True):
        end = begin + _num_bytes(spec, dtype)
        part = whole[begin:end]
        if begin % dtype.itemsize:
            part = part.clone()
        yield spec.name, part.view(dtype).view(spec.shape)
        begin = end


def _format(spec: TensorSpec) -> torch.dtype:
    found = getattr(torch, spec.dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"tensor {spec.name!r}: torch has no number format {spec.dtype!r}")
    if min(spec.shape, default=0) < 0 or _num_bytes(spec, found) > MOST_TENSOR_BYTES:
        raise ConfigError(f"tensor {spec.name!r} cannot have the shape {list(spec.shape)}")
    return found


def _num_bytes(spec: TensorSpec, dtype: torch.dtype) -> int:
    return prod(spec.shape) * dtype.itemsize


class Group:
    """One that this process joins: a thread does, and then receives what is asked of it, one after the other."""

    def __init__(self, asked: JoinGroup, device: torch.device) -> None:
        """Raises ConfigError for what cannot be joined."""
        if not 0 < asked.rank < asked.world_size:
            raise ConfigError(
                f"group {asked.name!r}: rank {asked.rank} of {asked.world_size}; the trainer has rank 0, others those "
                "after it"
            )
        if not 0 < asked.port < 1 << 16:
            raise ConfigError(f"group {asked.name!r}: there is no port {asked.port}")
        if asked.backend == "nccl" and device.type != "cuda":
            raise ConfigError(f"group {asked.name!r}: NCCL is for GPUs; this engine computes on the CPU: use Gloo")
        self._asked, self._device = asked, device
        self.joined: Future[None] = Future()
        """Set by its thread."""
        self._left = False
        self._asked_for: SimpleQueue[Transfer | Future[Presence] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"group {asked.name}", daemon=True)
        self._thread.start()

    def receive(self, asked: ReceiveTarget) -> Transfer:
        """Raises ConfigError for formats and shapes that there are not."""
        transfer = Transfer(asked, self._device)
        self._asked_for.put(transfer)
        return transfer

    def is_there(self) -> Future[Presence]:
        """Whether the trainer is, once everything before is received; not known of a group that was left."""
        if self._left:
            return done(None)
        told: Future[Presence] = Future()
        self._asked_for.put(told)
        return told

    def leave(self, wait_s: float = 0.0) -> None:
        """After what is being received; waits so long for it: a group that is left at the end of a process is torn."""
        self._left = True
        self._asked_for.put(None)
        self._thread.join(wait_s)

    def _run(self) -> None:
        asked, began = self._asked, time.monotonic()
        plain = asked.backend == "nccl" and asked.rendezvous == "stateless"
        try:
            group: Collective = (PlainNccl if plain else TorchGroup)(asked, self._device)
        except Exception as error:
            text = str(error).partition("\n")[0]
            where = f"{asked.address}:{asked.port}"
            seconds = time.monotonic() - began
            self.joined.set_exception(
                ModelError(f"group {asked.name!r} at {where} could not be joined in {seconds:.0f} s: {text}")
            )
            return
        self.joined.set_result(None)
        while (asked_for := self._asked_for.get()) is not None:
            if isinstance(asked_for, Future):
                asked_for.set_result(group.is_there())
            else:
                asked_for.run(group)
            del asked_for
        group.close()


__all__ = ["LEAVE_S", "Empty", "Group", "Transfer", "unpacked"]
