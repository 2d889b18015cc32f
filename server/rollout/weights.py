"""New weights for a server while it serves: from files, from memory, or from a trainer's group; and their versions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from slipstream.engine.errors import SlipstreamError
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    FindSender,
    FinishTargetUpdate,
    JoinGroup,
    LeaveGroup,
    Operation,
    TargetUpdated,
    UpdateMode,
)
from slipstream.server.errors import ApiError, ConflictError, InvalidRequestError
from slipstream.server.rollout.serving import Host, Serving
from slipstream.server.rollout.sources import Source, from_disk, from_handles
from slipstream.server.rollout.turns import Turns
from slipstream.server.rollout.versions import Called, UnderWay, Versions

logger = logging.getLogger(__name__)
MOST_NUMBER = 2**31 - 1
NOT_KNOWN = (
    "the old weights serve on: not all tensors have come, and it cannot be seen whether their sender is there still; "
    "send every tensor, or say where the update begins and ends: /begin_weight_update and /end_weight_update, or "
    "/start_weight_update and /finish_weight_update"
)
Finish = Literal["yes", "no", "complete"]
"""Whether an update is finished with what has come: always, never, or if every tensor has."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of tensors that were sent."""

    missing: int
    """Tensors that have not come completely."""
    finished: TargetUpdated | None
    """Set if the update was finished with them."""


class WeightControl(Serving):
    """One update at a time; ``Control`` is one."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._versions = Versions()
        self.turns = Turns(lambda: self._update is not None)
        self._next_number = 1
        self._update: UnderWay | None = None
        self._beginning = asyncio.Lock()
        self._giving_up: set[asyncio.Task[None]] = set()
        self._coming: set[asyncio.Task[int]] = set()
        """Tensors on their way into an update."""
        self._lost: str | None = None
        """Why tensors could not be taken that others belong to."""

    @property
    def weight_version(self) -> str:
        """What trainers call the weights that serve."""
        return self.called(self._stats.target_version).name

    def called(self, number: int) -> Called:
        """What the weights of a delta's ``target_version`` are called; another object once it is another name."""
        return self._versions.called(number)

    def set_weight_version(self, name: str) -> None:
        """The weights that serve are called so from now on: tokens that they have sampled under another name keep it.

        So are those of an update under way that has no name: whoever sends it has it called so before it ends.
        """
        serving = self.called(self._stats.target_version)
        serving.give(name)
        if serving.name != name:
            self._versions.call(self._stats.target_version, Called(name))
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

    @contextmanager
    def part_of_update(self) -> Iterator[None]:
        """Around whatever becomes of tensors that are sent: where that fails, those beside them do not serve alone."""
        try:
            yield
        except ApiError as error:
            self._lost = self._lost or error.message
            raise

    async def begin_update(self, version: str | None = None, mode: UpdateMode = "keep") -> str:
        """Begins an update; one that is under way is given up. Returns its name, a number if ``version`` is None."""
        self._lost = None
        return await self._begin(version, mode)

    async def _begin(self, version: str | None, mode: UpdateMode, is_whole: bool = False) -> str:
        asked = int(version) if version is not None and version.isascii() and version.isdecimal() else 0
        number = max(self._next_number, min(asked, MOST_NUMBER))
        name = str(number) if version is None else version
        self._next_number = number + 1
        self._update = None
        await self.operate(BeginTargetUpdate(number, mode, name))
        self._update = UnderWay(number, Called(name, version is not None), is_whole)
        return name

    async def fill(self, version: str, source: Source) -> int:
        """Has the engine take tensors of the update under way; how many have not come completely then.

        Raises InvalidRequestError unless that update has this name.
        """
        return await self._fill(source(self._number(version)))

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

        Raises ConflictError, and gives the update up, where not all tensors have come and some that were sent could not
        be taken: ``keep_rest`` is for those that nobody sends.
        """
        number, update = self._number(version), self._update
        while self._coming:
            await asyncio.wait(set(self._coming))
        if update is None or self._update is not update:
            raise ConflictError(f"the update to version {version} was given up", code="superseded")
        if name is not None:
            update.called = Called(name)
        self._versions.call(number, update.called)
        lost = self._lost if keep_rest else None
        finish = FinishTargetUpdate(number, keep_rest and lost is None, checksums or {}, lora_scale)
        try:
            done = await self.operate(finish)
        except InvalidRequestError as error:
            if lost is None:
                raise
            await self.cancel_update()
            raise ConflictError(
                f"the old weights serve on: of what was sent some could not be taken ({lost}), and the rest is not all "
                f"({error.message}); send all of it again",
                code="update_failed",
            ) from None
        self._update = self._lost = None
        return done

    async def finish_what_came(self) -> str:
        """Ends the update under way, if there is one, for a trainer that says no more than that it goes on.

        What has not come stays as it is, if whoever has sent the rest is seen to be there still; of one that has ended
        nothing serves, which is told in words. Raises ConflictError, and gives the update up, where that cannot be
        known. See finish_update, too.
        """
        update = self._update
        if update is None:
            self._lost = None
        if update is None or update.is_whole:
            return ""
        try:
            is_there, name = await self.operate(FindSender(update.number)), update.called.name
            if is_there:
                await self.finish_update(name, keep_rest=True)
                return ""
        except ApiError as error:
            if self._update is update:
                self._update = self._lost = None
                await self._give_up(update.number)
            if isinstance(error, InvalidRequestError):  # nothing of this call is wrong
                raise ConflictError(f"the old weights serve on: {error.message}", code="update_failed") from None
            raise
        if self._update is update:
            await self.cancel_update()
        if is_there is None:
            raise ConflictError(NOT_KNOWN, code="update_failed")
        logger.warning(told := f"the update to version {name} is given up: whoever has sent a part of it has ended")
        return told

    async def cancel_update(self, version: str | None = None) -> None:
        """Gives the update under way up; without ``version``, whichever it is, if there is one."""
        name, self._lost = self.updating if version is None else version, None
        if name is None:
            return
        number = self._number(name)
        self._update = None
        await self.operate(CancelTargetUpdate(number))

    async def send(
        self,
        source: Source,
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
        lora_scale: float | None = None,
        is_whole: bool = False,
    ) -> Sent:
        """Has the engine take tensors, for the update under way or a new one; ``is_whole``: for one by themselves.

        An update of another version than that under way is a new one, unless that has no name yet. A failure gives the
        update up.
        """
        async with self._beginning:  # tensors that come at the same time are of one update
            before, lost = self._update, None
            if before is not None and before.is_whole and not is_whole:
                raise ConflictError("other weights are being read from files: send these after them", code="conflict")
            if before is not None and version is not None and not is_whole:
                before.called.give(version)
            if before is None or is_whole or version not in (None, before.called.name):
                if before is not None:  # of which more may come
                    lost = f"those of version {before.called.name} were given up for others"
                    self._lost = self._lost or lost
                await self._begin(version, mode, is_whole)
            update = self._update
            assert update is not None
        try:
            missing = await self._fill(source(update.number))
            done = None
            if finish == "yes" or (finish == "complete" and not missing):
                done = await self.finish_update(update.called.name, lora_scale=lora_scale)
                self._lost = lost
        except (ApiError, asyncio.CancelledError) as error:
            if self._update is update:
                self._update = None
                if not is_whole:
                    self._lost = str(error) or "nobody waited for them"
                task = asyncio.create_task(self._give_up(update.number))
                self._giving_up.add(task)
                task.add_done_callback(self._giving_up.discard)
            raise
        return Sent(missing, done)

    async def update_from_disk(
        self, path: str, version: str | None = None, mode: UpdateMode = "keep", is_lora: bool = False
    ) -> TargetUpdated:
        """Serves with the weights of ``sources.from_disk``, which are an update by themselves.

        An update that is under way is given up.
        """
        sent = await self.send(from_disk(path, is_lora), version, mode, "yes", is_whole=True)
        assert sent.finished is not None
        return sent.finished

    async def send_handles(
        self,
        pickled: bytes,
        names: Collection[str] = (),
        version: str | None = None,
        mode: UpdateMode = "keep",
        finish: Finish = "complete",
    ) -> Sent:
        """``send`` of ``sources.from_handles``, whose sender the engine can see.

        What one has sent that has ended since is given up, if the update serves as soon as it is whole.
        """
        before = self._update
        is_gone = before and finish == "complete" and await self.operate(FindSender(before.number)) is False
        if is_gone and self._update is before:
            await self.cancel_update()
        return await self.send(from_handles(pickled, names), version, mode, finish)

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
