"""Weights as trainers send them to vLLM's server: over a group that both have joined, or through memory that both see.

What is sent between two calls is one update: it serves as a whole, from its end on.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from slipstream.engine.operations import UpdateMode
from slipstream.server.errors import ApiError, ConflictError, InvalidRequestError
from slipstream.server.rollout import sources
from slipstream.server.rollout.control import Control
from slipstream.server.rollout.weights import Finish
from slipstream.server.service import Service
from slipstream.server.vllm.control_schema import Backend, InitInfo, UpdateInfo

GROUP = "vllm"
"""The group of a trainer that does not name it."""
TRL_GROUP = "trl"
PACKED_BYTES = 2**30
"""How much comes together where a trainer packs tensors and does not say how."""
Tensor = tuple[str, str, Iterable[int]]
"""Name, number format, shape."""


@dataclass(frozen=True)
class Announced:
    """Tensors that a trainer will send, and over which group."""

    group: str
    tensors: list[Tensor]


class Transfer:
    """What is known between two calls of a trainer."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._packed: int | None = None
        """Bytes of a packed buffer, if tensors come packed."""
        self._began = False
        """Whether the trainer has begun the update under way, and so will end it."""
        self.announced: Announced | None = None
        self._receiving: asyncio.Task[None] | None = None
        """What is received although nobody waits for it."""
        self._failure: str | None = None

    @property
    def _control(self) -> Control:
        return self._service.control

    @property
    def own_backend(self) -> Backend:
        """How tensors get to the device of this server."""
        return "nccl" if self._service.engine.ready.device.startswith("cuda") else "gloo"

    # vLLM's way ------------------------------------------------------------------------------------------------------

    async def init(self, info: InitInfo) -> None:
        """Joins the trainer's group; nothing to be done for what comes through memory."""
        await self._forget()
        self._packed = (info.packed_buffer_size_bytes or PACKED_BYTES) if info.packed else None
        if info.nccl_unique_id_b64 is not None:
            raise InvalidRequestError(
                "init_info.nccl_unique_id_b64 is not supported: send master_address and master_port",
                param="init_info.nccl_unique_id_b64",
                code="unsupported_parameter",
            )
        if info.master_address is None and info.master_port is None:
            return
        if None in (info.master_address, info.master_port, info.rank_offset, info.world_size):
            raise InvalidRequestError(
                "init_info: master_address, master_port, rank_offset and world_size belong together", param="init_info"
            )
        assert info.master_address and info.master_port and info.rank_offset is not None and info.world_size
        await self._control.join_group(
            GROUP,
            info.master_address,
            info.master_port,
            info.world_size,
            info.rank_offset,
            info.backend or self.own_backend,
            rendezvous="stateless",
        )

    async def shutdown(self) -> None:
        await self._forget()
        await self.leave(GROUP)

    async def leave(self, group: str) -> None:
        """There is none where weights came through memory, and none any more where it was left before."""
        with suppress(InvalidRequestError):
            await self._control.leave_group(group)

    async def start(self) -> None:
        await self._control.begin_update(mode="keep")
        self._began = True

    async def update(self, infos: Iterable[UpdateInfo]) -> None:
        """Takes tensors. They serve at the end of the update, or, if nobody has begun one, as soon as all have come.

        Raises ConflictError where that which was begun has been given up: what is left of it must not serve alone.
        """
        finish: Finish = "no" if self._began else "complete"
        if self._began and self._control.updating is None:
            raise ConflictError(
                "the update of the weights that was begun has been given up: start another one", code="no_update"
            )
        for info in infos:
            if info.shared_memory is not None and info.num_bytes is not None:
                source = sources.from_shared_memory(info.shared_memory, info.num_bytes)
                await self._control.send(source, finish=finish)
            elif info.ipc_handles_pickled is not None:
                pickled = decoded(info.ipc_handles_pickled)
                await self._control.send_handles(pickled, info.names or (), finish=finish)
            else:
                packed = self._packed
                if info.packed is not None:  # as before vLLM 0.28
                    size = info.packed_buffer_size_bytes or self._packed or PACKED_BYTES
                    packed = size if info.packed else None
                tensors = list(zip(info.names or (), info.dtype_names or (), info.shapes or (), strict=True))
                await self._control.send(sources.from_group(GROUP, tensors, packed), finish=finish)

    async def finish(self, version: str | None = None) -> None:
        """What has come serves from now on, beside what has not. Raises ConflictError if no update is under way."""
        self._began = False
        if self._control.updating is None:
            raise ConflictError("no update of the weights is under way: start one first", code="no_update")
        await self._control.finish_update(self._control.updating, keep_rest=True, name=version)

    async def finish_if_begun(self) -> None:
        """For trainers that do not say when an update ends but by going on."""
        self._began = False
        await self._control.finish_what_came()

    async def _forget(self) -> None:
        """Whoever begins anew has nothing to do with what another trainer has left."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait({self._receiving})
        self._receiving = self._failure = None
        self._began = False
        await self._control.cancel_update()

    # AReaL's way -----------------------------------------------------------------------------------------------------

    async def join(self, name: str, address: str, port: int, world_size: int, rank: int, backend: Backend) -> None:
        await self._forget()
        await self._control.join_group(name, address.strip("[]"), port, world_size, rank, backend)

    async def receive_announced(self) -> Announced:
        """Takes the tensors that were announced; they serve when all have come, or when generation goes on."""
        if (announced := self.announced) is None:
            raise ConflictError("no tensors are announced: send their names first", code="no_update")
        self.announced = None
        await self._control.send(sources.from_group(announced.group, announced.tensors), mode=self.mode)
        return announced

    async def receive_lora(self, name: str, scale: float) -> None:
        """Takes the announced matrices of a LoRA, which serves at once."""
        if (announced := self.announced) is None:
            raise ConflictError("no tensors are announced: send their names first", code="no_update")
        self.announced = None
        await self._control.cancel_update()
        source = sources.from_group(announced.group, announced.tensors)
        await self._control.send(source, name, self.mode, "yes", lora_scale=scale)

    @property
    def mode(self) -> UpdateMode:
        """What becomes of open requests: AReaL ends those that have begun. In a pause it has done that before."""
        return "keep" if self._control.paused else "abort"

    # TRL's way -------------------------------------------------------------------------------------------------------

    async def join_behind(self, host: str, port: int, world_size: int) -> None:
        """Begins to join a group; the trainer makes it after this is answered.

        Raises InvalidRequestError where the trainer wants to join one of this server.
        """
        if host in ("0.0.0.0", "::"):
            raise InvalidRequestError(
                "host: the group is the trainer's here, so send its address (slipstream.clients.adapters.trl does), or "
                "use TRL from 1.11 on, which does so by itself",
                param="host",
                code="unsupported_parameter",
            )
        await self._forget()
        joining = self._control.join_group(
            TRL_GROUP, host, port, world_size, world_size - 1, self.own_backend, rendezvous="stateless"
        )
        self._run(joining)

    def receive_behind(self, tensors: list[Tensor]) -> None:
        """Takes tensors one after the other; the trainer waits behind the last. Nobody waits for the answer.

        Raises ConflictError if one of those before could not be received.
        """
        self._check()
        control = self._control

        async def receive() -> None:
            if tensors[:-1]:
                await control.send(sources.from_group(TRL_GROUP, tensors[:-1]))
            await control.send(sources.from_group(TRL_GROUP, tensors[-1:], barrier=True))

        self._run(receive())

    async def settle(self) -> None:
        """What has come serves from now on. Raises ConflictError if something could not be received."""
        if self._receiving is not None:
            await asyncio.wait({self._receiving})
        self._check()
        await self.finish_if_begun()

    def _run(self, doing: Coroutine[Any, Any, None]) -> None:
        before = self._receiving

        async def run() -> None:
            if before is not None:
                await asyncio.wait({before})
            try:
                await doing
            except ApiError as error:
                self._failure = self._failure or error.message

        self._receiving = asyncio.create_task(run())

    def _check(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise ConflictError(f"the weights sent before could not be received: {failure}", code="update_failed")


def decoded(text: str) -> bytes:
    """Raises InvalidRequestError for what is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequestError(
            "update_info.ipc_handles_pickled is not base64", param="update_info.ipc_handles_pickled"
        ) from None
