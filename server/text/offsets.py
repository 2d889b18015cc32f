"""Where in the text of an answer, or of a prompt, each of its tokens begins."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from slipstream.server.text.detokenize import IncrementalDetokenizer
from slipstream.server.text.tokenizer import Tokenizer


class OffsetDetokenizer:
    """An IncrementalDetokenizer that also notes where each token begins, in characters.

    A token that begins inside of a character has the offset of that character; one without text, that of what comes
    next.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self._detokenizer = detokenizer
        self._offsets: list[int] = []
        self.end = 0
        """Characters that have come out."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token) for token in token_ids])

    def finish(self) -> str:
        text = self._detokenizer.finish()
        self.end += len(text)
        return text

    def skip(self) -> None:
        """A token that is not to be shown."""
        self._offsets.append(self.end)

    def take(self) -> list[int]:
        """The offsets of the tokens since the last call."""
        offsets, self._offsets = self._offsets, []
        return offsets

    def _push(self, token: int) -> str:
        held = self._detokenizer.held
        before = self._detokenizer.held_text if held else ""
        text = self._detokenizer.push((token,))
        width = 0
        if not text:  # they are still held: what they end with may be the beginning of a character
            width = len(utf_8_decode(held, "replace", False)[0])
        elif text.startswith(before):
            width = len(before)
        self._offsets.append(self.end + width)
        self.end += len(text)
        return text


def prompt_offsets(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its text, in which special tokens may or may not be written out."""
    detokenizer = OffsetDetokenizer(IncrementalDetokenizer(tokenizer, skip_special_tokens=False))
    for token in tokens:
        special = token in tokenizer.special_ids
        if special and not text.startswith(tokenizer.token_text(token), detokenizer.end):
            detokenizer.skip()
        else:
            detokenizer.push((token,))
    return [min(offset, len(text)) for offset in detokenizer.take()]
