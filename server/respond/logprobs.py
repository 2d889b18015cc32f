"""Log-probabilities of the tokens of an answer's text, not of what it thinks or which tools it calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.generation import Piece
from slipstream.server.openai.logprobs import LogprobFormatter
from slipstream.server.tools.blocks import BlockEvent


class TextLogprobs:
    """For one answer: its text is cut into tokens, and each belongs to the block in which its text is told.

    Tokens without text of their own at the end, such as the one that ends the answer, are left out.
    """

    def __init__(self, formatter: LogprobFormatter, top: int) -> None:
        self._formatter, self._top = formatter, top
        self.blocks: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        """By the number of the block."""
        self._waiting: list[tuple[int, TokenLogprobs]] = []
        """Where tokens begin whose text has not been cut off yet, in the answer as the model wrote it."""
        self._untold: list[tuple[int, TokenLogprobs]] = []
        """Tokens whose text was cut off, and held back by who looks for calls in it."""
        self._end = 0
        """Characters that were cut off."""

    def cut(self, piece: Piece) -> Iterator[tuple[str, bool]]:
        """The text token by token, and whether this is the last of it; ``told`` is asked of each before the next."""
        self._waiting += zip(piece.offsets, piece.logprobs, strict=True)
        self._waiting.sort(key=lambda each: each[0])  # as they are, so that each is looked at once
        start, last = self._end, self._end + len(piece.text)
        begin, taken = start, 0
        for end in [*sorted({offset for offset, _ in self._waiting if start < offset < last}), last]:
            while taken < len(self._waiting) and self._waiting[taken][0] < end:
                self._untold.append(self._waiting[taken])
                taken += 1
            self._end = end
            yield piece.text[begin - start : end - start], end == last and piece.finish_reason is not None
            begin = end
        del self._waiting[:taken]

    def told(self, event: BlockEvent) -> list[dict[str, Any]]:
        """What belongs to an event of text; empty for another."""
        if event.kind != "more":
            return []
        untold, self._untold = self._untold, []
        if event.block.kind != "text":
            return []
        begin = self._end - len(event.text)  # what was held back before it is markup
        entries = [entry for offset, entry in untold if offset >= begin]
        found: list[dict[str, Any]] = self._formatter.chat(entries, self._top)["content"]
        self.blocks[event.block.index] += found
        return found
