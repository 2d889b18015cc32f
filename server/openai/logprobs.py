"""Log-probabilities in the three shapes the OpenAI dialect has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slipstream.engine.messages import TokenLogprobs
from slipstream.server.text import Tokenizer, prompt_offsets

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class LogprobFormatter:
    def __init__(self, tokenizer: Tokenizer, as_token_ids: bool, asked: Sequence[int] = ()) -> None:
        """``asked``: tokens to tell of in place of the likeliest, those of SamplingParams.logprob_token_ids."""
        self.tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._asked = asked

    def name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_token_ids else self.tokenizer.token_text(token)

    def prompt_offsets(self, tokens: Sequence[int], text: str) -> list[int]:
        return prompt_offsets(self.tokenizer, tokens, text)

    def candidates(self, entry: TokenLogprobs, top: int) -> list[tuple[int, float]]:
        """The likeliest tokens of a position; or the one that stands there, and those that were asked for."""
        if not self._asked:
            return entry.top[:top]
        return list(({entry.token: entry.logprob} | dict(zip(self._asked, entry.asked, strict=True))).items())

    def chat(self, entries: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
        return {
            "content": [
                self._chat_token(entry.token, entry.logprob)
                | {"top_logprobs": [self._chat_token(token, logprob) for token, logprob in self.candidates(entry, top)]}
                for entry in entries
            ]
        }

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.name(token),
            "logprob": max(logprob, LOWEST),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }

    def legacy(
        self, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], top: int, offsets: Sequence[int]
    ) -> dict[str, Any]:
        """``offsets`` are where the tokens begin in the text of the choice, in characters."""
        return {
            "tokens": [self.name(token) for token in tokens],
            "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [None if entry is None else self._legacy_top(entry, top) for entry in entries],
            "text_offset": list(offsets),
        }

    def _legacy_top(self, entry: TokenLogprobs, top: int) -> dict[str, float]:
        """The sampled token comes first, as in vLLM, then the others, best first."""
        found = {self.name(entry.token): max(entry.logprob, LOWEST)}
        for token, logprob in self.candidates(entry, top):
            found.setdefault(self.name(token), max(logprob, LOWEST))
        return found

    def prompt(self, entries: Sequence[TokenLogprobs | None], top: int) -> list[dict[str, Any] | None]:
        return [None if entry is None else self._prompt_position(entry, top) for entry in entries]

    def _prompt_position(self, entry: TokenLogprobs, top: int) -> dict[str, Any]:
        ranked = [(entry.token, entry.logprob, entry.rank)]
        ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], start=1)]
        return {
            str(token): {
                "logprob": max(logprob, LOWEST),
                "rank": rank,
                "decoded_token": self.tokenizer.token_text(token),
            }
            for token, logprob, rank in ranked
        }
