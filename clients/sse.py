"""Server-sent events: bytes in, the data of complete events out."""

from __future__ import annotations

from typing import Any, NamedTuple


class Chunk(NamedTuple):
    """One event of a stream: when it was received (``time.perf_counter()`` seconds) and its decoded JSON object."""

    received: float
    data: dict[str, Any]


class SSEDecoder:
    """Cuts a byte stream into events; lines may end in LF or CRLF, and blocks may break anywhere.

    Only ``data`` fields are kept: comments (keep-alives), ``event``, ``id`` and ``retry`` are dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, block: bytes) -> list[bytes]:
        """The data of every event that ``block`` completes."""
        lines = (self._rest + block).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.endswith(b"\r"):
                line = line[:-1]
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
