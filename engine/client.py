"""An engine at the other end of a channel: submit, abort, call, and one stream of token deltas per request.

A server's engine runs in a process of its own (``EngineClient.start``), so that Python work for HTTP and text never
holds the interpreter lock the step loop needs; ``engine/thread.py`` runs one in a thread of this process, over the same
channel. One message goes out per request and one comes back per step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from slipstream.engine import child
from slipstream.engine.config import EngineConfig
from slipstream.engine.early import as_json, environment
from slipstream.engine.errors import EngineDiedError, MisfitError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.handle import EngineHandle, RequestStream
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
from slipstream.engine.operations import Answer, AnyOperation, Operation
from slipstream.engine.totals import added, at_rest
from slipstream.engine.wire import ClientChannel

CLOSE_SECONDS = 10.0
"""Time in which an engine that is told to end has to, writing down what it keeps."""
LOST_SECONDS = 2.0
"""Time after which an engine whose connection is lost is killed, and one that has ended has nothing more to say: on a
busy machine it takes a while to end with a status of its own."""


ERRORS = {
    "failed": SlipstreamError,
    "refused": ModelError,
    "misfit": MisfitError,
    "superseded": SupersededError,
}
"""What the kinds of a CallReply are raised as."""


class Host(Protocol):
    """What an engine runs in."""

    @property
    def pid(self) -> int: ...

    def stop(self) -> None:
        """Asks the engine to end after the step under way, writing down what it keeps."""
        ...

    def kill(self) -> None:
        """Ends it without waiting for the step under way."""
        ...

    async def wait(self) -> str:
        """Returns when it has ended, and says how."""
        ...


class ProcessHost:
    """A process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, descriptor: int, config: EngineConfig, entry: str, arguments: tuple[str, ...]) -> ProcessHost:
        process = await asyncio.create_subprocess_exec(
            *child.command(entry, str(descriptor), as_json(config), *arguments),
            env=environment(),
            pass_fds=(descriptor,),
            # Ctrl-C reaches the whole process group; the server decides when the engine ends.
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> str:
        return f"the engine process ended: {describe_exit(await self._process.wait())}"


class EngineClient:
    """Owns one engine, from its start to its end, and the channel to it: an EngineHandle."""

    def __init__(self, host: Host, before: EngineHandle | None = None) -> None:
        self.ready: EngineReady
        self._host = host
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
        """Set when nothing of it is left and all that waited for it was told."""
        self._watcher: asyncio.Task[None]
        self._channel = ClientChannel(self._handle, self._on_lost)
        self._is_silent = asyncio.Event()
        """Nothing arrives any more."""
        self._streams: dict[int, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self.ids: Iterator[int] = itertools.count(1) if before is None else before.ids
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._closing = False

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        entry: str = "slipstream.engine.process",
        arguments: tuple[str, ...] = (),
        before: EngineHandle | None = None,
    ) -> EngineClient:
        """Starts an engine process and waits until its model is loaded.

        ``entry`` is the module it runs; it gets the socket, the configuration and ``arguments``. The engine that ended
        ``before`` hands on its counters and request ids.

        Raises:
            ModelError: the model or the configuration cannot be served; the message is meant for the user.
            EngineDiedError: the process ended for another reason.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            host = await ProcessHost.start(theirs.fileno(), config, entry, arguments)
        return await cls.connect(ours, host, before)

    @classmethod
    async def connect(cls, channel: socket.socket, host: Host, before: EngineHandle | None = None) -> EngineClient:
        """Waits until the engine that ``host`` runs at the other end has loaded its model; raises what start raises."""
        client = cls(host, before)
        client._watcher = asyncio.create_task(client._watch())
        try:
            await asyncio.get_running_loop().create_connection(lambda: client._channel, sock=channel)
            client.ready = await client._ready
        except BaseException:
            client._ready.cancel()
            client.kill()  # it has nothing yet that it could lose
            await client.close()
            raise
        return client

    @property
    def stats(self) -> EngineStats:
        if self._before is None:
            return self._reported
        if self._total is None or self._total[0] is not self._reported:
            self._total = self._reported, added(self._before, self._reported)
        return self._total[1]

    @property
    def pid(self) -> int:
        return self._host.pid

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def next_request_id(self) -> int:
        return next(self.ids)

    def submit(self, request: NewRequest) -> RequestStream:
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

    async def call(self, operation: Operation[Answer]) -> Answer:
        if self.failure is not None:
            raise EngineDiedError(self.failure)
        call_id = next(self.ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        assert isinstance(operation, AnyOperation)
        self._channel.send(Call(call_id, operation))
        self._calls[call_id] = future
        answer: Answer = await future
        return answer

    def kill(self) -> None:
        self._host.kill()

    async def close(self) -> None:
        self._closing = True
        self._host.stop()
        try:
            await asyncio.wait_for(asyncio.shield(self._watcher), CLOSE_SECONDS)
        except TimeoutError:
            self.kill()
            await self._watcher
        self._channel.close()

    def _handle(self, message: FromEngine) -> None:
        if self.failure is not None:
            return  # it has ended, as everybody was told: what was still on its way would make it look alive
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
        self._is_silent.set()
        if not self._closing:
            asyncio.get_running_loop().call_later(LOST_SECONDS, self.kill)

    async def _watch(self) -> None:
        how = await self._host.wait()
        with contextlib.suppress(TimeoutError):  # its last words say why, and may be read only after its end is known
            await asyncio.wait_for(self._is_silent.wait(), LOST_SECONDS)
        reason = "the server is shutting down" if self._closing else how
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
