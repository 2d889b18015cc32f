"""How much of what clients send and do not read is in memory at the same time."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from slipstream.server.errors import OverloadedError

RETRY_HELD_S = 5


class HeldBytes:
    """A sum with a limit."""

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self.total = 0
        self._what = what

    def hold(self) -> Hold:
        return Hold(self)

    def add(self, count: int) -> None:
        """Raises OverloadedError if there is no room for so many more."""
        if self.total + count > self.most:
            raise OverloadedError(
                f"the server holds {self.total} bytes of {self._what}, and {count} more would exceed {self.most}",
                code="too_much_in_flight",
                retry_after_s=RETRY_HELD_S,
            )
        self.total += count


class Hold:
    """The part of one request; given back at the end of the block."""

    def __init__(self, held: HeldBytes) -> None:
        self._held = held
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.total -= self._count
        self._count = 0

    def add(self, count: int) -> None:
        """Raises OverloadedError if there is no room for so many more."""
        self._held.add(count)
        self._count += count
