"""The API process's view of the engine: submit, abort, call, and one stream of token deltas per request.

The engine runs in a process of its own, so that Python work for HTTP and text never holds the interpreter lock the
step loop needs. One message goes out per request and one comes back per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec

from slipstream.engine import child
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import EngineDiedError, MisfitError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.messages import (
    AbortRequests,
    Call,
    CallReply,
    EngineFailed,
    EngineReady,
    EngineStats,
    FinishReason,
    FromEngine,
    NewRequest,
    StepOutputs,
    TokenDelta,
)
from slipstream.engine.totals import added, at_rest
from slipstream.engine.wire import ClientChannel

CLOSE_SECONDS = 10.0
"""Within which an engine must end that is told to, writing down what it keeps."""
LOST_SECONDS = 0.5
"""After which an engine whose connection is lost is killed."""


MAX_WAITING_DELTAS = 64
"""More of them become one, which takes a tenth of the memory."""


def merged(deltas: list[TokenDelta]) -> TokenDelta:
    """One delta that says what these do; none of them is the last of its request."""
    last = deltas[-1]
    return msgspec.structs.replace(
        deltas[0],
        tokens=[token for delta in deltas for token in delta.tokens],
        logprobs=None if last.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or ()],
        num_drafted=sum(delta.num_drafted for delta in deltas),
        num_accepted=sum(delta.num_accepted for delta in deltas),
        target_version=last.target_version,
        drafter_version=last.drafter_version,
    )


ERRORS = {
    "failed": SlipstreamError,
    "refused": ModelError,
    "misfit": MisfitError,
    "superseded": SupersededError,
}
"""What the kinds of a CallReply are raised as."""


class RequestStream:
    """The deltas of one request, in order; ends after the one that carries a finish_reason."""

    def __init__(self, client: EngineClient, request_id: int) -> None:
        self.request_id = request_id
        self._client = client
        self._deltas: list[TokenDelta] = []
        self._wake: asyncio.Future[None] | None = None
        self._finished = False
        self.on_last: Callable[[TokenDelta], None] | None = None
        """Called with the last delta when it arrives, also of a request whose deltas nobody reads any more."""
        self.lost = False
        """It ended because the engine did."""

    def put(self, delta: TokenDelta) -> None:
        if len(self._deltas) >= MAX_WAITING_DELTAS:  # whoever reads them is slow
            self._deltas = [merged(self._deltas)]
        self._deltas.append(delta)
        if delta.finish_reason is not None and self.on_last is not None:
            self.on_last(delta)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def next(self) -> list[TokenDelta]:
        """Every delta that has arrived since the last call, at least one; empty once the stream has ended."""
        if self._finished:
            return []
        if not self._deltas:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
            self._wake = None
        deltas, self._deltas = self._deltas, []
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
            self._client.abort([self.request_id], stopped)


class EngineClient:
    """Owns one engine process, from its start to its end, and the channel to it."""

    def __init__(self, before: EngineClient | None = None) -> None:
        self.ready: EngineReady
        self._reported = EngineStats()
        self._before = before.stats if before is not None else None
        """What the engines before it had counted."""
        self._total: tuple[EngineStats, EngineStats] | None = None
        self.on_step: list[Callable[[StepOutputs], None]] = []
        self.last_step_at = time.monotonic()
        """When the engine last finished a step or reported that it has nothing to do."""
        self.failure: str | None = None
        """Why nothing can be asked of it any more."""
        self.ended = asyncio.Event()
        """Set when the process is gone and all that waited for it was told."""
        self._process: asyncio.subprocess.Process
        self._watcher: asyncio.Task[None]
        self._channel = ClientChannel(self._handle, self._on_lost)
        self._streams: dict[int, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids: Iterator[int] = itertools.count(1) if before is None else before._ids
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._closing = False

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        entry: str = "slipstream.engine.process",
        arguments: tuple[str, ...] = (),
        before: EngineClient | None = None,
    ) -> EngineClient:
        """Starts the engine process and waits until its model is loaded.

        ``entry`` is the module it runs; it gets the socket, the configuration and ``arguments``. The engine that ended
        ``before`` hands on its counters and request ids.

        Raises:
            ModelError: the model or the configuration cannot be served; the message is meant for the user.
            EngineDiedError: the process ended for another reason.
        """
        ours, theirs = socket.socketpair()
        fields = msgspec.json.encode(dataclasses.asdict(config)).decode()
        client = cls(before)
        with theirs:
            client._process = await asyncio.create_subprocess_exec(
                *child.command(entry, str(theirs.fileno()), fields, *arguments),
                # Huge pages for tensors of 2 MiB and more: fewer TLB misses over weights and cache (5-8 % of a step).
                env={"THP_MEM_ALLOC_ENABLE": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"},
                pass_fds=(theirs.fileno(),),
                # Ctrl-C reaches the whole process group; the server decides when the engine ends.
                start_new_session=True,
            )
        client._watcher = asyncio.create_task(client._watch())
        try:
            await asyncio.get_running_loop().create_connection(lambda: client._channel, sock=ours)
            client.ready = await client._ready
        except BaseException:
            client._ready.cancel()
            client.kill()  # it has nothing yet that it could lose
            await client.close()
            raise
        return client

    @property
    def stats(self) -> EngineStats:
        """As of the last step; counters go on from those of the engines before."""
        if self._before is None:
            return self._reported
        if self._total is None or self._total[0] is not self._reported:
            self._total = self._reported, added(self._before, self._reported)
        return self._total[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_open(self) -> int:
        """Requests submitted and not yet finished."""
        return len(self._streams)

    def next_request_id(self) -> int:
        return next(self._ids)

    def submit(self, request: NewRequest) -> RequestStream:
        """Hands a request to the engine; the stream yields exactly one delta with a finish_reason, whatever happens."""
        stream = RequestStream(self, request.request_id)
        if self.failure is not None:
            self._lose(stream, self.failure)
            return stream
        self._channel.send(request)
        self._streams[request.request_id] = stream
        return stream

    def abort(self, request_ids: list[int], stopped: bool = False) -> None:
        if open_ids := [request_id for request_id in request_ids if request_id in self._streams]:
            self._channel.send(AbortRequests(open_ids, stopped))

    async def call(self, operation: str, **arguments: Any) -> Any:
        """Runs a control operation between two steps and returns its result.

        Raises:
            ModelError: the engine refuses what was asked for, and would again.
            SupersededError: something else was asked for before it was done.
            SlipstreamError: the operation failed; serving goes on.
            EngineDiedError: the engine process is gone.
        """
        if self.failure is not None:
            raise EngineDiedError(self.failure)
        call_id = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._channel.send(Call(call_id, operation, arguments))
        self._calls[call_id] = future
        return await future

    def kill(self) -> None:
        """Ends the engine process without waiting for the step under way."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Ends the engine process; open requests end with finish_reason "abort"."""
        self._closing = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), CLOSE_SECONDS)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        await self._watcher
        self._channel.close()

    def _handle(self, message: FromEngine) -> None:
        match message:
            case StepOutputs():
                self._reported = message.stats
                self.last_step_at = time.monotonic()
                for delta in message.deltas:
                    stream = self._streams.get(delta.request_id)
                    if stream is not None:
                        if delta.finish_reason is not None:
                            del self._streams[delta.request_id]
                        stream.put(delta)
                for callback in self.on_step:
                    callback(message)
            case CallReply():
                future = self._calls.pop(message.call_id, None)
                if future is None or future.done():
                    return  # nobody waits for it any more
                if message.error is None:
                    future.set_result(message.result)
                else:
                    future.set_exception(ERRORS[message.kind](message.error))
            case EngineReady():
                if not self._ready.done():
                    self._ready.set_result(message)
            case EngineFailed():
                error = ModelError(message.message) if message.user_error else EngineDiedError(message.message)
                self._end(message.message, error)
                self.kill()  # it has nothing more to say, and must not hang on its way out

    def _on_lost(self) -> None:
        """A process that nobody can talk to is of no use, and could hang for ever; mostly it has just ended."""
        if not self._closing:
            asyncio.get_running_loop().call_later(LOST_SECONDS, self.kill)

    async def _watch(self) -> None:
        code = await self._process.wait()
        reason = "the server is shutting down" if self._closing else f"the engine process ended: {describe_exit(code)}"
        self._end(reason, EngineDiedError(reason))
        self.ended.set()

    def _end(self, reason: str, error: SlipstreamError) -> None:
        """Gives every open request and call its terminal message."""
        if self.failure is None:
            self.failure = reason
        self._reported = at_rest(self._reported)
        if not self._ready.done():
            self._ready.set_exception(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._lose(stream, reason)

    def _lose(self, stream: RequestStream, reason: str) -> None:
        stream.lost = True
        finish: FinishReason = "abort" if self._closing else "error"
        stream.put(TokenDelta(request_id=stream.request_id, tokens=[], finish_reason=finish, error=reason))


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
