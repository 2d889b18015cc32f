"""How both processes log: one line per record, whatever names and texts of clients it contains."""

import logging
import traceback
from types import TracebackType


def set_up_logging(level: str) -> None:
    """Has records written to stderr; ``level`` is that of --log-level."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

LONGEST = 4000
"""Characters of a message that are shown."""


class OneLineFormatter(logging.Formatter):
    """Messages are one line of printable characters; lines of a traceback are indented, so that none passes for a
    record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        text = super().formatMessage(record)
        return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]} ({len(text)} characters)")

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802
        return indented("".join(traceback.format_exception(*ei)))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return indented(stack_info)


def printable(text: str) -> str:
    """The text with everything but visible characters and spaces escaped: line breaks, terminal codes, directions."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def indented(text: str) -> str:
    return "\n".join("    " + printable(line) for line in text.rstrip("\n").split("\n"))
