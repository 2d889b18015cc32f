"""An engine process that is started before anybody knows its configuration, and imports meanwhile what it needs."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from slipstream.engine.child import EarlyChild

if TYPE_CHECKING:
    from slipstream.engine.config import EngineConfig


def environment() -> dict[str, str]:
    """That of an engine process.

    Huge pages are for tensors of 2 MiB and more: there are fewer TLB misses over weights and cache (5-8 % of a step).
    """
    return {"THP_MEM_ALLOC_ENABLE": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}


def as_json(config: EngineConfig) -> str:
    """How an engine process is told its configuration."""
    import dataclasses  # nothing is imported that starting the process need not wait for

    import msgspec

    return msgspec.json.encode(dataclasses.asdict(config)).decode()


class EarlyProcess:
    """A host (``engine.client``) once it is told its configuration.

    As a context it ends the process if it was told nothing by then, because the server could not start.
    """

    def __init__(self, entry: str) -> None:
        """``entry`` is the module it runs, as for ``EngineClient.start``."""
        self.began = time.monotonic()
        self.channel, self._theirs = socket.socketpair()
        self._child = EarlyChild(entry, environment(), self._theirs.fileno())
        self._process = self._child.process
        self._is_told = False

    def __enter__(self) -> EarlyProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_told:
            with self.channel, self._theirs, self._process:
                self._process.kill()

    def tell(self, config: EngineConfig, arguments: tuple[str, ...]) -> None:
        self._is_told = True
        with self._theirs:
            self._child.tell(str(self._theirs.fileno()), as_json(config), *arguments)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    async def wait(self) -> str:
        import asyncio

        from slipstream.engine.client import describe_exit

        return f"the engine process ended: {describe_exit(await asyncio.to_thread(self._process.wait))}"
