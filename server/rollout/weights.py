"""New weights for a server while it serves: from files, from memory, or from a trainer's group; and their versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from slipstream.engine.errors import ConfigError, EngineDiedError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.handle import EngineHandle
from slipstream.engine.messages import EngineStats
from slipstream.engine.operations import (
    Answer,
    BeginTargetUpdate,
    CancelTargetUpdate,
    ChecksumTarget,
    FillTarget,
    FillTargetHandles,
    FillTargetShared,
    FinishTargetUpdate,
    JoinGroup,
    LeaveGroup,
    Operation,
    ReadTarget,
    ReadTensor,
    ReceiveTarget,
    TargetUpdated,
    TensorRows,
    TensorSpec,
    UpdateMode,
)
from slipstream.server.errors import ApiError, ConflictError, InvalidRequestError, UnavailableError

FILES = "default"
"""What the weights of the model's files are called."""
MOST_NAMES = 1000
"""Versions whose names are known: of more, the oldest are forgotten. Nothing that runs is that old, but weights of the
model's files come back."""
MOST_NUMBER = 2**31 - 1
Finish = Literal["yes", "no", "complete"]
"""Whether an update is finished with what has come: always, never, or if every tensor has."""


class Host(Protocol):
    """What control needs of the server."""

    @property
    def engine(self) -> EngineHandle: ...

    def require_ready(self) -> None:
        """Raises UnavailableError unless requests are taken."""

    def engine_gone(self, reason: str) -> UnavailableError: ...


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of tensors that were sent."""

    missing: int
    """Tensors that have not come completely."""
    finished: TargetUpdated | None
    """Set if the update was finished with them."""


@dataclass(slots=True, eq=False)
class Called:
    """What weights are called for a while."""

    name: str
    is_given: bool = True
    """Whether somebody has said so; else it is a number."""

    def give(self, name: str) -> None:
        """A name that comes late counts where there was none."""
        if not self.is_given:
            self.name, self.is_given = name, True


@dataclass(slots=True)
class _Update:
    """One under way."""

    number: int
    """What the engine calls its version; versions of this server never have the same."""
    called: Called


class WeightControl:
    """One update at a time; ``Control`` is one."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._called: dict[int, Called] = {0: Called(FILES)}
        """Versions of the weights by number, as trainers call them."""
        self._next_number = 1
        self._update: _Update | None = None
        self._beginning = asyncio.Lock()
        self._snapshot: dict[str, str] | None = None
        self._giving_up: set[asyncio.Task[None]] = set()
        self._coming: set[asyncio.Task[int]] = set()
        """Tensors on their way into an update."""

    @property
    def weight_version(self) -> str:
        """What trainers call the weights that serve."""
        return self.called(self._stats.target_version).name

    def called(self, number: int) -> Called:
        """What the weights of a delta's ``target_version`` are called; another object once it is another name."""
        if number not in self._called:
            self._called[number] = Called(str(number), is_given=False)
        return self._called[number]

    def set_weight_version(self, name: str) -> None:
        """The weights that serve are called so from now on: tokens that they have sampled under another name keep it.

        So are those of an update under way that has no name: whoever sends it has it called so before it ends.
        """
        serving = self.called(self._stats.target_version)
        serving.give(name)
        if serving.name != name:
            self._called[self._stats.target_version] = Called(name)
        if self._update is not None:
            self._update.called.give(name)

    @property
    def updating(self) -> str | None:
        """The name of the update under way."""
        return None if self._update is None else self._update.called.name

    @property
    def updating_number(self) -> int | None:
        """The number of the update under way, which it keeps when it is named."""
        return None if self._update is None else self._update.number

    async def begin_update(self, version: str | None = None, mode: UpdateMode = "keep") -> str:
        """Begins an update; one that is under way is given up. Returns its name, a number if ``version`` is None."""
        asked = int(version) if version is not None and version.isascii() and version.isdecimal() else 0
        number = max(self._next_number, min(asked, MOST_NUMBER))
        name = str(number) if version is None else version
        self._next_number = number + 1
        self._update = None
        await self.operate(BeginTargetUpdate(number, mode, name))
        self._update = _Update(number, Called(name, version is not None))
        return name

    async def fill(self, version: str, tensors: bytes, first_rows: dict[str, int] | None = None) -> int:
        """Sends tensors of the update under way, as a safetensors file; how many have not come completely."""
        return await self._fill(FillTarget(self._number(version), tensors, first_rows or {}))

    async def read(self, version: str, path: str) -> int:
        """Has the engine read tensors of the update under way from a path; see ``fill``."""
        return await self._fill(ReadTarget(self._number(version), path))

    async def fill_shared(self, version: str, segment: str, num_bytes: int) -> int:
        """Has the engine read tensors of the update under way from shared memory; see ``fill``."""
        return await self._fill(FillTargetShared(self._number(version), segment, num_bytes))

    async def fill_from_group(
        self,
        version: str,
        group: str,
        tensors: Iterable[tuple[str, str, Iterable[int]]],
        buffer_bytes: int | None = None,
        barrier: bool = False,
    ) -> int:
        """Has the engine take tensors of the update under way that a trainer broadcasts; see ``receive``, ``fill``."""
        specs = _specs(tensors)
        return await self._fill(ReceiveTarget(self._number(version), group, specs, buffer_bytes, barrier))

    async def finish_update(
        self,
        version: str,
        keep_rest: bool = False,
        checksums: dict[str, str] | None = None,
        lora_scale: float | None = None,
        name: str | None = None,
    ) -> TargetUpdated:
        """Serves with the new weights from now on; see FinishTargetUpdate. ``name``: what they are called after all.

        What is on its way belongs to them: it is waited for.
        """
        number, update = self._number(version), self._update
        while self._coming:
            await asyncio.wait(set(self._coming))
        if update is None or self._update is not update:
            raise ConflictError(f"the update to version {version} was given up", code="superseded")
        if name is not None:
            update.called = Called(name)
        self._called[number] = update.called
        while len(self._called) > MOST_NAMES:
            del self._called[min(self._called.keys() - {0})]
        done = await self.operate(FinishTargetUpdate(number, keep_rest, checksums or {}, lora_scale))
        self._update = None
        return done

    async def cancel_update(self, version: str | None = None) -> None:
        """Gives the update under way up; without ``version``, whichever it is, if there is one."""
        name = self.updating if version is None else version
        if name is None:
            return
        number = self._number(name)
        self._update = None
        await self.operate(CancelTargetUpdate(number))

    async def update_from_disk(
        self, path: str, version: str | None = None, mode: UpdateMode = "keep", is_lora: bool = False
    ) -> TargetUpdated:
        """Serves with the weights in a folder or file of the engine's machine: a whole model, or a LoRA.

        An update that is under way is given up. ``is_lora``: nothing but a LoRA is meant.
        """
        sent = await self._send(lambda number: ReadTarget(number, path, is_lora), version, mode, "yes", is_whole=True)
        assert sent.finished is not None
        return sent.finished

    async def update_from_tensors(
        self,
        tensors: bytes,
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
        keep_rest: bool = False,
        lora_scale: float | None = None,
    ) -> Sent:
        """Takes tensors as a safetensors file, for the update under way or a new one.

        An update of another version than that under way is a new one, unless that has no name yet. Here as in all
        ``update_from`` and ``receive``, a failure gives the update up.
        """
        return await self._send(
            lambda number: FillTarget(number, tensors), version, mode, finish, keep_rest, lora_scale
        )

    async def update_from_shared_memory(
        self,
        segment: str,
        num_bytes: int,
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
        keep_rest: bool = False,
    ) -> Sent:
        """As ``update_from_tensors``, from a shared-memory segment on the engine's machine."""
        return await self._send(
            lambda number: FillTargetShared(number, segment, num_bytes), version, mode, finish, keep_rest
        )

    async def update_from_handles(
        self,
        pickled: bytes,
        names: Collection[str] = (),
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
        keep_rest: bool = False,
    ) -> Sent:
        """As ``update_from_tensors``, from tensors that a process of the engine's machine shares; FillTargetHandles."""
        return await self._send(
            lambda number: FillTargetHandles(number, pickled, tuple(names)), version, mode, finish, keep_rest
        )

    async def join_group(
        self,
        name: str,
        address: str,
        port: int,
        world_size: int,
        rank: int,
        backend: Literal["gloo", "nccl"],
        rendezvous: Literal["named", "stateless"] = "named",
        timeout_s: float = 120.0,
    ) -> None:
        """Joins a trainer's group; returns when all have joined. See JoinGroup."""
        await self.operate(JoinGroup(name, address, port, world_size, rank, backend, rendezvous, timeout_s))

    async def leave_group(self, name: str) -> None:
        await self.operate(LeaveGroup(name))

    async def receive(
        self,
        group: str,
        tensors: Iterable[tuple[str, str, Iterable[int]]],
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
        keep_rest: bool = False,
        buffer_bytes: int | None = None,
        barrier: bool = False,
        lora_scale: float | None = None,
    ) -> Sent:
        """As ``update_from_tensors``, from what the trainer broadcasts: name, number format and shape of each tensor.

        See ReceiveTarget.
        """
        specs = _specs(tensors)

        def receive(number: int) -> ReceiveTarget:
            return ReceiveTarget(number, group, specs, buffer_bytes, barrier)

        return await self._send(receive, version, mode, finish, keep_rest, lora_scale)

    async def read_tensor(self, name: str, first_row: int = 0, rows: int = 1) -> TensorRows:
        """Rows of a tensor that serves."""
        return await self.operate(ReadTensor(name, first_row, rows))

    async def checksums(self) -> dict[str, str]:
        """See ChecksumTarget."""
        return (await self.operate(ChecksumTarget())).by_name

    async def snapshot_weights(self) -> None:
        """Remembers the checksums of the weights that serve."""
        self._snapshot = await self.checksums()

    async def differing_weights(self) -> list[str]:
        """The tensors that are not as they were at ``snapshot_weights``."""
        if self._snapshot is None:
            raise ConflictError("there is no snapshot of the weights to compare with: take one first", code="conflict")
        before = self._snapshot
        now = await self.checksums()
        return sorted(name for name in before | now if before.get(name) != now.get(name))

    async def operate(self, operation: Operation[Answer]) -> Answer:
        """The engine's answer; its errors become those of HTTP."""
        self._host.require_ready()
        try:
            return await self._host.engine.call(operation)
        except SupersededError as error:
            raise ConflictError(str(error), code="superseded") from None
        except (ModelError, ConfigError) as error:
            raise InvalidRequestError(str(error)) from None
        except EngineDiedError as error:
            raise self._host.engine_gone(str(error)) from None
        except SlipstreamError as error:
            raise ApiError(str(error)) from None

    async def _send(
        self,
        fill: Callable[[int], Operation[int]],
        version: str | None,
        mode: UpdateMode,
        finish: Finish,
        keep_rest: bool = False,
        lora_scale: float | None = None,
        is_whole: bool = False,
    ) -> Sent:
        """``is_whole``: it is an update by itself."""
        async with self._beginning:  # tensors that come at the same time are of one update
            under_way = None if is_whole else self._update
            if under_way is not None and version is not None:
                under_way.called.give(version)
            if under_way is None or version not in (None, under_way.called.name):
                await self.begin_update(version, mode)
            update = self._update
            assert update is not None
        try:
            missing = await self._fill(fill(update.number))
            done = None
            if finish == "yes" or (finish == "complete" and not missing):
                done = await self.finish_update(update.called.name, keep_rest, lora_scale=lora_scale)
        except (ApiError, asyncio.CancelledError):
            if self._update is update:
                self._update = None
                task = asyncio.create_task(self._give_up(update.number))
                self._giving_up.add(task)
                task.add_done_callback(self._giving_up.discard)
            raise
        return Sent(missing, done)

    async def _fill(self, operation: Operation[int]) -> int:
        """How many tensors have not come completely then."""
        coming = asyncio.create_task(self.operate(operation))
        self._coming.add(coming)
        coming.add_done_callback(self._coming.discard)
        return await coming

    async def _give_up(self, number: int) -> None:
        try:
            await self._host.engine.call(CancelTargetUpdate(number))
        except SlipstreamError:
            return  # there is nothing of it any more

    def _number(self, version: str) -> int:
        """The number of the update under way; raises InvalidRequestError unless it has this name."""
        if self._update is None or self._update.called.name != version:
            what = "none" if self._update is None else f"one to version {self._update.called.name}"
            raise InvalidRequestError(f"no update to version {version} is under way, but {what}: begin it first")
        return self._update.number

    @property
    def _stats(self) -> EngineStats:
        return self._host.engine.stats


def _specs(tensors: Iterable[tuple[str, str, Iterable[int]]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in tensors)
