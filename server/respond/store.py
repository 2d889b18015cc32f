"""Responses that are kept for those who come back to them: in memory, in bounds, each for its owner alone."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from slipstream.engine.messages import TrafficLevel
from slipstream.server.errors import NotFoundError
from slipstream.server.respond.following import EventLog

MOST = 1000
"""Responses of one owner."""
MOST_BYTES = 2**24
"""The same for bytes."""
MOST_BYTES_IN_ALL = 2**27


@dataclass(slots=True)
class Stored:
    owner: str
    id: str
    body: bytes
    """The answer to GET."""
    is_open: bool = True
    """Whether it is still being written."""
    is_wanted: bool = True
    """Whether nobody has deleted it meanwhile."""
    turns: tuple[bytes, ...] = ()
    """The conversation up to this response and with it: items in JSON, without the brackets of a list."""
    items: dict[str, bytes] = field(default_factory=dict)
    """Those of them that this response has said, by their ids."""
    level: TrafficLevel | None = None
    """The most that may be kept of the conversation as traffic, where somebody in it has said so."""
    events: EventLog | None = None
    """Those of one in the background that can be followed."""
    abort: Callable[[], None] = lambda: None
    """Ends what is being written."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    size: int = 0
    """What the store counts it for, in bytes."""

    @property
    def history(self) -> bytes:
        return b",".join(turn for turn in self.turns if turn)


class ResponseStore:
    """Those go first that nobody has asked for the longest; responses under way take no room before their end."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES, in_all: int = MOST_BYTES_IN_ALL) -> None:
        """``most`` and ``most_bytes`` of each owner."""
        self._most, self._most_bytes, self._in_all = most, most_bytes, in_all
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._counts: dict[str, tuple[int, int]] = {}
        """Number and bytes, by owner."""
        self._items: dict[tuple[str, str], Stored] = {}
        """Which response has said it, by owner and id of the item."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self._counts.values())

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: Stored) -> None:
        """In place of one with its id."""
        self.drop(stored)
        # Turns are shared with the responses before; each counts them as its own, since it may outlive those.
        events = 0 if stored.events is None else stored.events.size
        stored.size = 0 if stored.is_open else len(stored.body) + sum(map(len, stored.turns)) + events
        self._stored[stored.owner, stored.id] = stored
        self._items.update({(stored.owner, name): stored for name in stored.items})
        self._count(stored.owner, 1, stored.size)
        while self._is_full(stored.owner):
            self._forget(stored.owner)
        while self.num_bytes > self._in_all:
            self._forget(None)

    def get(self, owner: str, response_id: str) -> Stored:
        """Raises NotFoundError, whether it is another's or nobody's."""
        found = self._stored.get((owner, response_id))
        if found is None:
            raise NotFoundError(
                f"there is no response {response_id[:100]!r}; they are kept in memory, the latest of each tenant",
                code="response_not_found",
            )
        self._stored.move_to_end((owner, response_id))
        return found

    def items(self, owner: str, names: Iterable[str]) -> bytes:
        """Those that are known of these, as turns have them."""
        asked = dict.fromkeys(names)
        return b",".join(said.items[name] for name in asked if (said := self._items.get((owner, name))) is not None)

    def speakers(self, owner: str, names: Iterable[str]) -> list[Stored]:
        """The responses that have said these items, as far as they are known."""
        return [said for name in names if (said := self._items.get((owner, name))) is not None]

    def drop(self, stored: Stored) -> None:
        """Forgets it, if it is known."""
        if (found := self._stored.pop((stored.owner, stored.id), None)) is not None:
            self._count(found.owner, -1, -found.size)
            for name in found.items:
                self._items.pop((found.owner, name), None)

    def _is_full(self, owner: str) -> bool:
        count, size = self._counts.get(owner, (0, 0))
        return count > self._most or size > self._most_bytes

    def _forget(self, owner: str | None) -> None:
        self.drop(next(each for each in self._stored.values() if owner is None or each.owner == owner))

    def _count(self, owner: str, count: int, size: int) -> None:
        before = self._counts.get(owner, (0, 0))
        after = before[0] + count, before[1] + size
        if after[0]:
            self._counts[owner] = after
        else:
            self._counts.pop(owner, None)
