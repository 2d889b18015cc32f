"""What the text of an answer consists of, as a parser tells it while the text arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool; its arguments follow."""

    index: int
    """0 for the first of the answer."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of the call that began last, as JSON text."""

    index: int
    text: str


Part = Content | Reasoning | CallBegin | CallArguments


class Parser(Protocol):
    """What the parts add up to does not depend on how the text is cut into pieces."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """What was held back, now that no more text comes."""
        ...


def beginning_of(text: str, markers: tuple[str, ...]) -> int:
    """Where the end of a text begins that may turn out to be the beginning of a marker; its length if it has none."""
    for start in range(max(0, len(text) - max(map(len, markers)) + 1), len(text)):
        if any(marker.startswith(text[start:]) for marker in markers):
            return start
    return len(text)
