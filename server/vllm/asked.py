"""What a request to a control route says: its query, as FastAPI's servers read it, and its body."""

from __future__ import annotations

from typing import Literal, TypeVar

from fastapi import Request

from slipstream.server.errors import InvalidRequestError
from slipstream.server.http.body import BodyType, parse, read_body
from slipstream.server.service import Service
from slipstream.server.vllm.prepare import UNKNOWN

TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
FALSE = frozenset({"false", "0", "no", "off", "f", "n"})
Word = TypeVar("Word", bound=str)


async def body_of(service: Service, request: Request, model: type[BodyType]) -> BodyType:
    """No body is an empty one. Raises InvalidRequestError."""
    return parse(model, await read_body(request, service.config.max_body_bytes) or b"{}", UNKNOWN)


def one_of(request: Request, name: str, words: tuple[Word, ...], default: Word) -> Word:
    """A word of the query. Raises InvalidRequestError for another."""
    found = request.query_params.get(name, default)
    for word in words:
        if found == word:
            return word
    raise InvalidRequestError(f"{name}: {', '.join(words)}, not {found[:60]!r}", param=name)


def flag(request: Request, name: str, default: bool) -> bool:
    """Raises InvalidRequestError for what is neither true nor false."""
    found = request.query_params.get(name)
    if found is None:
        return default
    if found.lower() in TRUE:
        return True
    if found.lower() in FALSE:
        return False
    raise InvalidRequestError(f"{name}: true or false, not {found[:60]!r}", param=name)


def words_of(request: Request, name: str) -> list[str] | None:
    """Every value of a parameter that may come several times; None if it does not come at all."""
    return request.query_params.getlist(name) or None


PauseWord = Literal["abort", "wait", "keep"]
PAUSES: tuple[PauseWord, ...] = ("abort", "wait", "keep")
