"""An answer as a row of blocks, as dialects write it in which reasoning, text and calls are items beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from slipstream.server.tools.answer import AnswerParser, Speech
from slipstream.server.tools.parts import CallBegin, Content, Part, Reasoning

BlockKind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    index: int
    kind: BlockKind
    name: str = ""
    """The tool that is called."""
    id: str = ""
    """The id of the call."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it; the arguments of a call, as JSON, empty where the model was cut off before them."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """A block begins, gets more text, or ends; before another one begins, the one before has ended."""

    kind: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """For one answer; the blocks do not depend on how the text is cut."""

    def __init__(self, speech: Speech | None) -> None:
        self.blocks: list[Block] = []
        self._speech = speech
        self._parser = AnswerParser(speech) if speech is not None else None
        self._open: Block | None = None

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.has_calls

    def push(self, text: str, is_last: bool) -> list[BlockEvent]:
        parts: list[Part] = [Content(text)] if text else []
        if self._parser is not None:
            parts = self._parser.push(text) + (self._parser.finish() if is_last else [])
        events = [event for part in parts for event in self._take(part)]
        return events + self._end() if is_last else events

    def _take(self, part: Part) -> list[BlockEvent]:
        if isinstance(part, CallBegin):
            assert self._speech is not None
            return self._begin(Block(len(self.blocks), "call", part.name, self._speech.new_id(part.name, part.index)))
        kind: BlockKind = (
            "text" if isinstance(part, Content) else "reasoning" if isinstance(part, Reasoning) else "call"
        )
        events: list[BlockEvent] = []
        if self._open is None or self._open.kind != kind:
            events = self._begin(Block(len(self.blocks), kind))
        assert self._open is not None
        self._open.pieces.append(part.text)
        return [*events, BlockEvent("more", self._open, part.text)]

    def _begin(self, block: Block) -> list[BlockEvent]:
        events = self._end()
        self.blocks.append(block)
        self._open = block
        return [*events, BlockEvent("begin", block)]

    def _end(self) -> list[BlockEvent]:
        ended, self._open = self._open, None
        return [] if ended is None else [BlockEvent("end", ended)]
