"""The control of a server by whoever trains its model: pauses, memory, weights and their versions.

One object over the engine, of which the admin API and the dialects of trainers are faces. It names nothing as they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from slipstream.engine.messages import EngineStats
from slipstream.engine.operations import (
    MemoryTag,
    Pause,
    PauseMode,
    ReleaseMemory,
    ResetPrefixCache,
    Resume,
    ResumeMemory,
)
from slipstream.server.errors import InvalidRequestError, UnavailableError
from slipstream.server.rollout.groups import Groups
from slipstream.server.rollout.serving import Host
from slipstream.server.rollout.weights import WeightControl

LOOK_S = 0.01
RETRY_ASLEEP_S = 5
ALL_MEMORY: tuple[MemoryTag, ...] = ("kv_cache", "weights")


class Control(WeightControl):
    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._open: dict[str, set[int]] = {}
        """Sequences that run or wait in the engine, by the ids of their HTTP requests."""
        self.groups = Groups(lambda ids: host.engine.abort(list(ids)))
        """Samples that end together."""
        self._refusing = False
        """Whether requests are refused, and do not wait, while memory is released."""
        self._halts = 0
        """Things under way for which the engine pauses as long as they last."""
        self.is_paused_for_good = False
        """Whether somebody has paused it who will resume it; else a pause is only for one of these things."""

    # Requests that are open ------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, request_ids: Collection[int], names: Iterable[str]) -> Iterator[None]:
        """Around sequences that run under these names, by which they can be aborted."""
        known = set(names)
        for name in known:
            self._open.setdefault(name, set()).update(request_ids)
        try:
            yield
        finally:
            for name in known & self._open.keys():  # a sequence may be called as its request is
                self._open[name].difference_update(request_ids)
                if not self._open[name]:
                    del self._open[name]

    @property
    def open_requests(self) -> Collection[str]:
        """Names of open requests: ids of HTTP requests, and of their sequences where these have some."""
        return self._open.keys()

    async def abort(self, names: Collection[str] | None = None) -> int:
        """Ends requests, or all of them; unknown names are ignored. How many sequences that concerns.

        Each still gets an answer, with its tokens so far and finish reason ``abort``.
        """
        some = self._open.keys() if names is None else names
        ids = set[int]().union(*(self._open.get(name, ()) for name in some))
        if ids:
            self._host.engine.abort(sorted(ids))
        return len(ids)

    # Pauses and memory -----------------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        return self._stats.is_paused

    async def pause(self, mode: PauseMode, settle: bool = False) -> None:
        """Lets no request begin, and none go on but as the mode says, until ``resume``.

        ``settle``: returns when nothing runs any more, which mode ``wait`` takes time for.
        """
        await self.operate(Pause(mode))
        self.is_paused_for_good = True
        if settle:
            await self._settled()

    async def resume(self) -> None:
        """What needs the engine to stand still comes to its end first."""
        self.is_paused_for_good = False
        if not self._halts:
            await self.operate(Resume())

    @asynccontextmanager
    async def halted(self, mode: PauseMode) -> AsyncIterator[None]:
        """Around what is done while nothing runs; see ``pause``. It ends no pause of others, whenever that begins."""
        self._halts += 1
        try:
            await self.operate(Pause(mode))
            await self._settled()
            yield
        finally:
            self._halts -= 1
            if not self._halts and not self.is_paused_for_good:
                with suppress(UnavailableError):  # an engine that takes over does not pause for it
                    await self.operate(Resume())

    async def _settled(self) -> None:
        await self._until(lambda stats: stats.is_still or not stats.is_paused)

    async def flush_prefix_cache(self) -> bool:
        """Nothing computed so far can be found again; False if requests still hold some of it."""
        return await self.operate(ResetPrefixCache())

    @property
    def released(self) -> frozenset[str]:
        """What of its memory the engine has given back: ``kv_cache``, ``weights``."""
        return frozenset(self._stats.released)

    def require_awake(self) -> None:
        """Raises UnavailableError where requests are refused since the engine has given memory back."""
        if self._refusing and (released := self._stats.released):
            raise UnavailableError(
                f"the server sleeps: it has given back the memory of {' and '.join(released)}; wake it up first",
                code="asleep",
                retry_after_s=RETRY_ASLEEP_S,
            )

    @property
    def refuses(self) -> bool:
        return self._refusing and bool(self._stats.released)

    async def release_memory(
        self, tags: Collection[MemoryTag] = ALL_MEMORY, keep_weights: bool = True, mode: PauseMode = "abort"
    ) -> None:
        """Gives memory back to the system until ``resume_memory``; see ReleaseMemory.

        ``mode``: what becomes of open requests. Abort: they end, and those that come are refused. Else they wait: those
        that have begun are computed again from their tokens then, or, with ``wait``, are finished first.
        """
        release = ReleaseMemory(_tags(tags), keep_weights, mode == "abort")
        if mode == "wait":
            async with self.halted("wait"):
                await self.operate(release)
        else:
            await self.operate(release)
        self._refusing = mode == "abort"

    async def resume_memory(self, tags: Collection[MemoryTag] = ALL_MEMORY) -> None:
        """Takes memory again, and serves on when all of it is back; see ResumeMemory."""
        await self.operate(ResumeMemory(_tags(tags)))

    async def reload_weights(self) -> None:
        """Serves with the weights of the model's files again, as version ``default``; an update under way is given up.

        Requests wait meanwhile, and are computed again from their tokens.
        """
        await self.cancel_update()
        await self.operate(ReleaseMemory(("weights",), False, False))
        await self.resume_memory(["weights"])

    async def _until(self, condition: Callable[[EngineStats], bool]) -> None:
        while not condition(self._stats):
            self._host.require_ready()
            await asyncio.sleep(LOOK_S)


def _tags(tags: Collection[str]) -> tuple[MemoryTag, ...]:
    for tag in tags:
        if tag not in ALL_MEMORY:
            raise InvalidRequestError(f"memory has the tags {', '.join(ALL_MEMORY)}, not {tag!r}", param="tags")
    found: list[Any] = [tag for tag in ALL_MEMORY if tag in tags]
    return tuple(found)
