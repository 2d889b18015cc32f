"""How both processes log: one line per record, whatever names and texts of clients it contains."""

import json
import logging
import os
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

logger = logging.getLogger(__name__)
LogFormat = Literal["text", "json"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that is being answered, where one is."""


def set_up_logging(level: str, form: LogFormat = "text") -> None:
    """Has records written to stderr; ``level`` and ``form`` are those of --log-level and --log-format."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What libraries say at these levels is not ours to vouch for: it may hold whatever they handle.
    for name in ("opentelemetry", "urllib3", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLogger().level))


def say(text: str) -> None:
    """Writes it to standard output; or to the log where that cannot be written: on a full disk, or with nobody there
    who reads it, a server serves all the same."""
    try:
        print(text, flush=True)
    except OSError as error:
        logger.warning("standard output cannot be written: %s; it would say: %s", error.strerror, text)
        # What is left in its buffer would make an end in good order look like a failure.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def formatter(form: LogFormat) -> logging.Formatter:
    return JsonFormatter() if form == "json" else OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

LONGEST = 4000
"""Characters of a message that are shown."""
LONGEST_TRACEBACK = 20_000


class OneLineFormatter(logging.Formatter):
    """Messages are one line of printable characters; lines of a traceback are indented, so that none passes for a
    record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return printable(shortened(super().formatMessage(record)))

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802
        return indented("".join(traceback.format_exception(*ei)))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return indented(stack_info)


class JsonFormatter(logging.Formatter):
    """A record is a line of JSON with ``time`` (UTC), ``level``, ``logger``, ``message``, and where there are some
    ``request_id`` and ``exception``.
    """

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shortened(record.getMessage()),
        }
        if request := request_id.get():
            found["request_id"] = request
        if record.exc_info:
            found["exception"] = "".join(traceback.format_exception(*record.exc_info))[-LONGEST_TRACEBACK:]
        return json.dumps(found)  # ASCII, so nothing in it can end a line or steer a terminal


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ({len(text)} characters)"


def printable(text: str) -> str:
    """The text with everything but visible characters and spaces escaped: line breaks, terminal codes, directions."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(text: str) -> str:
    return "\n".join("    " + printable(line) for line in text.rstrip("\n").split("\n"))
