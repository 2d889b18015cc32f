"""Failures that must not end the engine: what they happened in is told once, with a traceback."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class Faults:
    """What keeps failing would fill the log, so only the first failure of each kind is told."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, kind: str, consequence: str) -> None:
        """Called where the exception is handled."""
        if kind not in self._told:
            self._told.add(kind)
            log.exception("%s failed: %s; further failures of it are not told", kind, consequence)
