"""What a server needs of an engine, wherever it runs, and the stream of token deltas that a request gets."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import msgspec

from slipstream.engine.messages import EngineReady, EngineStats, NewRequest, StepOutputs, TokenDelta
from slipstream.engine.operations import Answer, Operation

MAX_WAITING_DELTAS = 64
"""More of them are merged, which takes a tenth of the memory."""


def merged(deltas: list[TokenDelta]) -> list[TokenDelta]:
    """As few deltas as say what these do; none of them is the last of its request.

    One for each version of the target: deltas say which one their tokens are of.
    """
    return [_merged(list(some)) for _, some in itertools.groupby(deltas, lambda delta: delta.target_version)]


def _merged(deltas: list[TokenDelta]) -> TokenDelta:
    last = deltas[-1]
    return msgspec.structs.replace(
        deltas[0],
        tokens=[token for delta in deltas for token in delta.tokens],
        logprobs=None if last.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or ()],
        num_drafted=sum(delta.num_drafted for delta in deltas),
        num_accepted=sum(delta.num_accepted for delta in deltas),
        drafter_version=last.drafter_version,
    )


class EngineHandle(Protocol):
    """An engine that has been started: requests go in, and each gets a stream with exactly one end, whatever happens.

    ``EngineClient`` is one over a channel, to a process of its own or to a thread of this one.
    """

    ready: EngineReady
    """What it serves; known before anybody gets the handle."""
    on_step: list[Callable[[StepOutputs], None]]
    """Called with what each step brought."""
    last_step_at: float
    """time.monotonic() of its last sign of life: the end of a step, or that it has nothing to do."""
    failure: str | None
    """Why it has ended; None while it serves."""
    ended: asyncio.Event
    """Set when it has ended and nothing of it is left."""

    ids: Iterator[int]
    """Ids for requests and calls; engines that replace each other share the iterator, so that no id comes twice."""

    @property
    def stats(self) -> EngineStats:
        """Statistics of the last step; counters go on from those of the engine that this one replaced."""
        ...

    @property
    def pid(self) -> int:
        """The process that computes."""
        ...

    @property
    def num_open(self) -> int:
        """Requests submitted and not yet finished."""
        ...

    def next_request_id(self) -> int: ...

    def submit(self, request: NewRequest) -> RequestStream:
        """Hands a request to the engine; the stream yields exactly one delta with a finish_reason, whatever happens."""
        ...

    def abort(self, request_ids: list[int], stopped: bool = False) -> None:
        """Stops those that still run. ``stopped``: their answers are whole, a stop string ended them."""
        ...

    async def call(self, operation: Operation[Answer]) -> Answer:
        """Runs a control operation between two steps and returns its answer.

        Raises:
            ModelError: the engine refuses what was asked for, and would again.
            SupersededError: something else was asked for before it was done.
            SlipstreamError: the operation failed; serving goes on.
            EngineDiedError: the engine is gone.
        """
        ...

    def kill(self) -> None:
        """Ends it without waiting for the step under way."""
        ...

    async def close(self) -> None:
        """Ends it; open requests end with finish_reason "abort"."""
        ...


class RequestStream:
    """The deltas of one request, in order; ends after the one that carries a finish_reason."""

    def __init__(self, engine: EngineHandle, request_id: int) -> None:
        self.request_id = request_id
        self._engine = engine
        self._deltas: list[TokenDelta] = []
        self._tokens = self._least = 0
        """Tokens that wait to be read, and how many somebody waits for."""
        self._wake: asyncio.Future[None] | None = None
        self._finished = False
        self.on_delta: Callable[[TokenDelta], None] | None = None
        """Called with every delta when it arrives, maybe long before it is read."""
        self.on_last: Callable[[TokenDelta], None] | None = None
        """Called with the last delta when it arrives, also of a request whose deltas nobody reads any more."""
        self.lost = False
        """Whether the request ended because the engine did."""

    def put(self, delta: TokenDelta) -> None:
        if len(self._deltas) >= MAX_WAITING_DELTAS:  # whoever reads them is slow
            self._deltas = merged(self._deltas)
        self._deltas.append(delta)
        self._tokens += len(delta.tokens)
        if self.on_delta is not None:
            self.on_delta(delta)
        if delta.finish_reason is not None and self.on_last is not None:
            self.on_last(delta)
        if self._wake is not None and not self._wake.done() and self._is_enough:
            self._wake.set_result(None)

    @property
    def _is_enough(self) -> bool:
        return self._tokens >= self._least or self._deltas[-1].finish_reason is not None

    async def next(self, least: int = 0) -> list[TokenDelta]:
        """Every delta that has arrived since the last call, at least one; empty once the stream has ended.

        They have ``least`` tokens together, unless the last one is among them.
        """
        if self._finished:
            return []
        self._least = least
        if not (self._deltas and self._is_enough):
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
            self._wake = None
        deltas, self._deltas, self._tokens = self._deltas, [], 0
        self._finished = deltas[-1].finish_reason is not None
        return deltas

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        while deltas := await self.next():
            for delta in deltas:
                yield delta

    def abort(self, stopped: bool = False) -> None:
        """Stops the request if it is still running; its blocks are freed at the next step.

        ``stopped``: the answer is whole, a stop string ended it.
        """
        if not self._finished:
            self._engine.abort([self.request_id], stopped)
