"""An engine in a thread of this process: the real one, over the same channel as one in a process of its own.

It shares the interpreter lock with everything else here, so it is for programs that embed an engine, and for tests,
which need not wait for a process to start.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
import threading

from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.handle import EngineHandle
from slipstream.engine.process import EngineLoop, MakeDrafters, MakeListeners
from slipstream.engine.wire import EngineChannel


class ThreadHost:
    """Runs an engine in a thread. Nobody can kill a thread: one that is killed is left alone and ends by itself."""

    def __init__(self, loop: EngineLoop, channel: EngineChannel, config: EngineConfig) -> None:
        self._engine_loop, self._channel, self._config = loop, channel, config
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._how = ""
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="engine", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        self._engine_loop.stop()

    def kill(self) -> None:
        self.stop()
        self._end("the engine thread was killed")

    async def wait(self) -> str:
        await self._ended.wait()
        return self._how

    def _run(self) -> None:
        try:
            how = f"the engine thread ended: exit code {self._engine_loop.run(self._config)}"
        except ConnectionError as error:
            how = f"the engine thread ended: {error}"
        finally:
            self._channel.close()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, how)

    def _end(self, how: str) -> None:
        self._how = self._how or how
        self._ended.set()


async def start_thread(
    config: EngineConfig,
    make_drafters: MakeDrafters = lambda _: (),
    make_listeners: MakeListeners = lambda _: (),
    before: EngineHandle | None = None,
) -> EngineClient:
    """Starts an engine in a thread and waits until its model is loaded; raises what EngineClient.start raises."""
    ours, theirs = socket.socketpair()
    channel = EngineChannel(theirs.detach())
    loop = EngineLoop(channel, make_drafters, make_listeners)
    return await EngineClient.connect(ours, ThreadHost(loop, channel, config), before)
