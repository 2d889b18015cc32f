"""What drafter evolution needs of the server that it belongs to, which knows it, and which it does not know."""

from __future__ import annotations

from typing import Protocol

from slipstream.engine.config import EngineConfig
from slipstream.engine.handle import EngineHandle
from slipstream.server.evolution.observer import Observer


class Served(Protocol):
    engine_config: EngineConfig
    """Configuration of the engine that serves now."""
    observer: Observer

    @property
    def engine(self) -> EngineHandle:
        """The one that serves, or that served last."""
        ...

    def drafter_versions(self) -> dict[str, int]:
        """Version of the learned drafter by route, as of the last step."""
        ...
