"""Pushes a trainer's weights to a server while it samples: as bytes, through shared memory, files or a group.

The one module of the clients that needs torch, which the trainer has anyway; it is loaded with the first push.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slipstream.clients.admin import AdminClient, Answer
from slipstream.clients.errors import ClientError

if TYPE_CHECKING:
    from torch import Tensor

UpdateMode = Literal["keep", "recompute", "abort"]
Tensors = Mapping[str, "Tensor"]
BUCKET_BYTES = 8 << 20
"""Most bytes of tensors that are sent over HTTP at once: below the server's --max-body-bytes."""
SEGMENT_BYTES = 256 << 20
GROUP_TIMEOUT = timedelta(seconds=120)


class Trainer:
    """A trainer's view of one server: every push is a new version of the weights, counted up.

    One push at a time. A push that fails, or is cancelled, leaves the server with the weights that it had.
    """

    def __init__(self, admin: AdminClient, first_version: int = 1) -> None:
        self.version = first_version - 1
        """The last version that the server took."""
        self._admin = admin
        self._dtype: str | None = None
        self._groups: dict[str, Any] = {}

    async def push(self, tensors: Tensors, mode: UpdateMode = "keep", **finish: Any) -> Answer:
        """Sends tensors in the bodies of requests, in parts where they are large.

        ``finish`` here and in the other pushes: ``keep_rest``, where the tensors are not all there are, or
        ``lora_scale``; see AdminClient.finish_update. The server compares checksums of all tensors but a LoRA's.
        """

        async def send(version: int) -> None:
            for bucket, first_rows in buckets(tensors, BUCKET_BYTES):
                await self._admin.fill(version, _packed(bucket, first_rows))

        return await self._update(send, tensors, mode, finish)

    async def push_shared(self, tensors: Tensors, mode: UpdateMode = "keep", **finish: Any) -> Answer:
        """Sends tensors through shared memory to a server on this machine."""

        async def send(version: int) -> None:
            for bucket in whole_buckets(tensors, SEGMENT_BYTES):
                data = _packed(bucket, {})
                segment = SharedMemory(create=True, size=len(data))
                try:
                    assert segment.buf is not None
                    segment.buf[: len(data)] = data
                    await self._admin.share(version, segment.name, len(data))
                finally:
                    segment.close()
                    segment.unlink()

        return await self._update(send, tensors, mode, finish)

    async def push_files(self, path: str | Path, mode: UpdateMode = "keep", **finish: Any) -> Answer:
        """Has the server read files that it sees under this path: a model's folder, a LoRA's, or a safetensors file."""

        async def send(version: int) -> None:
            await self._admin.read(version, str(path))

        return await self._update(send, {}, mode, finish)

    async def join(self, name: str, address: str, port: int, backend: Literal["gloo", "nccl"] = "gloo") -> None:
        """Makes a group of this process (rank 0) and the server (rank 1), which finds it at this address."""
        making = asyncio.to_thread(_make_group, name, address, port, 2, backend)
        joining = self._admin.join_group(name, address, port, 2, 1, backend=backend)
        self._groups[name], _ = await asyncio.gather(making, joining)

    async def leave(self, name: str) -> None:
        group = self._groups.pop(name)
        await self._admin.leave_group(name)
        _leave_group(group)

    async def push_group(self, name: str, tensors: Tensors, mode: UpdateMode = "keep", **finish: Any) -> Answer:
        """Broadcasts tensors in a group that was joined, one after the other."""
        group = self._groups[name]
        described = [(each, str(tensor.dtype), tuple(tensor.shape)) for each, tensor in tensors.items()]

        async def send(version: int) -> None:
            broadcasting = asyncio.create_task(asyncio.to_thread(_broadcast, group, tensors))
            try:
                await self._admin.receive(version, name, described)
                await broadcasting
            finally:
                if not broadcasting.done():
                    broadcasting.cancel()

        return await self._update(send, tensors, mode, finish)

    async def checksums(self, tensors: Tensors) -> dict[str, str]:
        """What the server has to say of these tensors: of their numbers in the format of its weights."""
        import torch

        if self._dtype is None:
            self._dtype = (await self._admin.status())["server"]["dtype"]
        dtype: torch.dtype = getattr(torch, str(self._dtype))

        def checksum(tensor: Tensor) -> str:
            rows = tensor.detach().to("cpu", dtype).contiguous().view(-1)
            return sha256(rows.view(torch.uint8).numpy().data).hexdigest()

        return await asyncio.to_thread(lambda: {name: checksum(tensor) for name, tensor in tensors.items()})

    async def _update(
        self, send: Callable[[int], Any], tensors: Tensors, mode: UpdateMode, finish: dict[str, Any]
    ) -> Answer:
        version = self.version + 1
        is_lora = finish.get("lora_scale") is not None
        checksums = {} if is_lora else await self.checksums(tensors)
        await self._admin.begin_update(version, mode)
        try:
            await send(version)
            report = await self._admin.finish_update(version, checksums=checksums, **finish)
        except BaseException:
            with suppress(ClientError):
                await self._admin.cancel_update(version)
            raise
        self.version = version
        return report


def buckets(tensors: Tensors, most: int) -> Iterator[tuple[dict[str, Tensor], dict[str, int]]]:
    """All rows in parts of at most so many bytes, or one row; with the first rows of tensors that are cut."""
    bucket: dict[str, Tensor] = {}
    firsts: dict[str, int] = {}
    size = 0
    for name, tensor in tensors.items():
        whole = tensor.detach()
        count = len(whole) if whole.dim() else 1
        rows = count if whole.dim() < 2 else max(most // max(whole[0].nbytes, 1), 1)
        for first in range(0, max(count, 1), max(rows, 1)):
            part = whole[first : first + rows] if whole.dim() else whole
            if bucket and (size + part.nbytes > most or name in bucket):
                yield bucket, firsts
                bucket, firsts, size = {}, {}, 0
            bucket[name] = part
            size += part.nbytes
            if whole.dim() >= 2 and rows < count:
                firsts[name] = first
    if bucket:
        yield bucket, firsts


def whole_buckets(tensors: Tensors, most: int) -> Iterator[dict[str, Tensor]]:
    """All tensors in parts of at most so many bytes, or one tensor."""
    bucket: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if bucket and sum(each.nbytes for each in bucket.values()) + tensor.nbytes > most:
            yield bucket
            bucket = {}
        bucket[name] = tensor
    if bucket:
        yield bucket


def _packed(tensors: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> bytes:
    from safetensors.torch import save

    # Clones: tied tensors share memory, and parts are views of others.
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    data: bytes = save(plain, {"first_rows": json.dumps(dict(first_rows))} if first_rows else None)
    return data


def _make_group(name: str, address: str, port: int, size: int, backend: str) -> Any:
    """As trainers make groups beside their default one: of torch's own parts."""
    from torch.distributed import distributed_c10d

    c10d: Any = distributed_c10d
    store, rank, size = next(c10d.rendezvous(f"tcp://{address}:{port}", 0, size, timeout=GROUP_TIMEOUT))
    store.set_timeout(GROUP_TIMEOUT)
    group, _ = c10d._new_process_group_helper(
        *(size, rank, [], c10d.Backend(backend), c10d.PrefixStore(name, store)),
        group_name=name,
        backend_options=None,
        timeout=GROUP_TIMEOUT,
    )
    c10d._world.pg_group_ranks[group] = {each: each for each in range(size)}
    return group


def _leave_group(group: Any) -> None:
    import torch.distributed as dist

    dist.destroy_process_group(group)


def _broadcast(group: Any, tensors: Tensors) -> None:
    import torch.distributed as dist

    for tensor in tensors.values():
        dist.broadcast(tensor.detach().contiguous(), src=0, group=group)


__all__: Sequence[str] = ["Trainer", "buckets", "whole_buckets"]
