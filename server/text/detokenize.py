"""Turns tokens into text while they arrive, and finds stop strings in that text.

This runs for every token of every stream on the cores the model runs on, so the paths for one token are short.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from slipstream.server.text.tokenizer import Tokenizer


class _Decoder(Protocol):
    @property
    def held(self) -> bytes: ...
    @property
    def held_text(self) -> str: ...
    def push(self, token_ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one sequence, piece by piece.

    What the ``push`` calls and the final ``finish`` return adds up to what the tokens add to the text of the prompt:
    ``tokenizer.decode`` of prompt and answer without what it says of the prompt alone. (Bytes of a character that is
    unfinished at the end of the prompt are not joined with those of the answer.) Text is held back while later tokens
    could still change it: the bytes of an unfinished character, or with byte-fallback vocabularies a whole run of byte
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> None:
        table = tokenizer.byte_table(skip_special_tokens)
        decoder: _Decoder
        decoder = _Bytes(table) if table is not None else _PrefixDifference(tokenizer, skip_special_tokens, prompt)
        self.push = decoder.push
        self.finish = decoder.finish
        self._decoder = decoder

    @property
    def held(self) -> bytes:
        """The bytes whose text is held back."""
        return self._decoder.held

    @property
    def held_text(self) -> str:
        """What they are if no more come that belong to them."""
        return self._decoder.held_text


class _Bytes:
    """Byte-level vocabularies: every token stands for fixed bytes."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._pending = b""

    @property
    def held(self) -> bytes:
        return self._pending

    @property
    def held_text(self) -> str:
        return utf_8_decode(self._pending, "replace", True)[0]

    def push(self, token_ids: Sequence[int]) -> str:
        table = self._table
        try:
            data = self._pending + b"".join([table[token_id] for token_id in token_ids])
        except IndexError:  # models pad their vocabulary; such a token has no text
            known = [table[token_id] for token_id in token_ids if token_id < len(table)]
            data = self._pending + b"".join(known)
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return text


class _PrefixDifference:
    """Any other vocabulary: the text of new tokens is what they add to the text of the token before them.

    The token before them is enough context, because decoders treat only the very first token in a special way
    (leading space) and otherwise join across tokens only in runs of byte tokens, which are never cut.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._byte_ids = tokenizer.byte_fallback_ids
        self._dropped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._size = tokenizer.vocab_size
        self._pending: list[int] = []
        self._set_context(self._last_visible(prompt))

    def _last_visible(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last token with text, but no byte, whose text could change with more bytes; or else all."""
        visible = (token for token in reversed(prompt) if token < self._size and token not in self._dropped)
        run: list[int] = []
        for token in visible:
            if token not in self._byte_ids:
                return [token]
            run.append(token)
        return run[::-1]

    def _set_context(self, tokens: list[int]) -> None:
        self._context = tokens
        self._context_text = self._decode(tokens, skip_special_tokens=False) if tokens else ""

    @property
    def held(self) -> bytes:
        return bytes(self._byte_ids[token] for token in self._pending)

    @property
    def held_text(self) -> str:
        return self._new_text(self._pending)

    def push(self, token_ids: Sequence[int]) -> str:
        pending = self._pending
        pending += [token for token in token_ids if token < self._size and token not in self._dropped]
        end = len(pending)
        while end and pending[end - 1] in self._byte_ids:
            end -= 1
        return self._commit(end)

    def finish(self) -> str:
        return self._commit(len(self._pending))

    def _commit(self, count: int) -> str:
        if count == 0:
            return ""
        tokens = self._pending[:count]
        new = self._new_text(tokens)
        del self._pending[:count]
        self._set_context(tokens[-1:])
        return new

    def _new_text(self, tokens: list[int]) -> str:
        return self._decode(self._context + tokens, skip_special_tokens=False)[len(self._context_text) :]


class StopChecker:
    """Cuts a text, given in chunks, before (or after) the first stop string in it.

    The stop string that is complete first wins, and of several complete at the same character the longest, so the
    result does not depend on how the text is split into chunks. Text that may be the beginning of a stop string is held
    back. Push the text of one token at a time to have ``chunks`` count tokens.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty")
        self.matched: str | None = None
        """The stop string that was found."""
        self.chunks = 0
        """Chunks pushed, up to and including the one that completed the stop string."""
        self._stops = sorted(stops, key=len, reverse=True)  # of equal ends the first found is the longest
        self._first_characters = {stop[0] for stop in stops}
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to pass on; nothing after a match."""
        if self.matched is not None:
            return ""
        self.chunks += 1
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        text = self._held + text
        end = len(text) + 1
        for stop in self._stops:
            start = text.find(stop, 0, end - 1)
            if start >= 0:
                end = start + len(stop)
                self.matched = stop
        if self.matched is not None:
            self._held = ""
            return text[: end if self._include_stop else end - len(self.matched)]
        keep = self._first_possible_start(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text held back, once no more will come."""
        text, self._held = self._held, ""
        return text

    def _first_possible_start(self, text: str) -> int:
        """Where the earliest proper beginning of a stop string at the end of the text starts."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first
