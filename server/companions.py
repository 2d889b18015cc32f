"""What runs beside requests, from when the server is loaded until it takes no more."""

from __future__ import annotations

from typing import Protocol


class Companion(Protocol):
    def start(self) -> None: ...

    async def stop(self) -> None: ...


class Companions:
    def __init__(self) -> None:
        self._members: list[Companion] = []

    def add(self, companion: Companion) -> None:
        self._members.append(companion)

    def start(self) -> None:
        for companion in self._members:
            companion.start()

    async def stop(self) -> None:
        """Once; later calls do nothing."""
        while self._members:
            await self._members.pop().stop()
