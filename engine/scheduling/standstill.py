"""Why no step is planned although there are requests: somebody has paused the engine, or it sleeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slipstream.engine.operations import MemoryTag, PauseMode
from slipstream.engine.scheduling.request import Request


@dataclass(slots=True)
class Standstill:
    pause: PauseMode | None = None
    released: tuple[MemoryTag, ...] = ()
    """What the engine has given back of its memory: it sleeps."""

    def holds(self, requests: Iterable[Request]) -> bool:
        """Whether nothing goes on to its end any more; these are the open requests."""
        if self.released or self.pause != "wait":
            return bool(self.released) or self.pause is not None
        return not any(request.has_begun for request in requests)
