"""What is kept of one request: when its chunks came and how many tokens they carried."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from slipstream.clients.sse import Chunk

# Where a chunk may carry text: completions have ``text``, chat has these in ``delta``.
_DELTA_TEXT = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(slots=True)
class RequestRecord:
    """Times are ``perf_counter()`` seconds.

    A *token chunk* is a chunk that carries text or counted tokens: a chunk with only a role or only a finish reason
    is none.
    """

    due: float
    """When it should have been sent."""
    start: float
    """When it was sent."""
    chunk_times: list[float] = field(default_factory=list)
    """When each token chunk was received."""
    chunk_tokens: list[int | None] = field(default_factory=list)
    """Tokens of each token chunk, None where the server did not say."""
    end: float = 0.0
    """When the last chunk with a choice was received; for a failed request, when it failed."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Tokens of the answer as the server's usage counts them, like those of the prompt."""
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def output_tokens(self) -> int:
        """Usage where the server reports it, else the tokens counted in the chunks, else one per token chunk."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return sum(1 if count is None else count for count in self.chunk_tokens)

    def add(self, chunk: Chunk) -> None:
        data = chunk.data
        new_tokens = self._count(data.get("usage"))
        choices = data.get("choices")
        if not choices:
            return
        choice: dict[str, Any] = choices[0]
        self.end = chunk.received
        if reason := choice.get("finish_reason"):
            self.finish_reasons.append(reason)
        if token_ids := choice.get("token_ids"):
            new_tokens = len(token_ids)
        delta = choice.get("delta") or {}
        if new_tokens or choice.get("text") or any(delta.get(name) for name in _DELTA_TEXT):
            self.chunk_times.append(chunk.received)
            self.chunk_tokens.append(new_tokens)

    def _count(self, usage: dict[str, Any] | None) -> int | None:
        """Take over the usage; the tokens that are new since the last one."""
        if not usage:
            return None
        before = self.completion_tokens or 0
        self.prompt_tokens = usage.get("prompt_tokens")
        self.completion_tokens = usage.get("completion_tokens", before)
        return self.completion_tokens - before

    def tokens_per_chunk(self) -> list[int] | None:
        """Tokens of every token chunk where they are known, else None.

        Known when the server counted them chunk by chunk, or when there are as many chunks as tokens.
        """
        counts = [count for count in self.chunk_tokens if count is not None]
        if len(counts) == len(self.chunk_times) and sum(counts) == self.output_tokens:
            return counts
        if self.completion_tokens == len(self.chunk_times):
            return [1] * len(self.chunk_times)
        return None

    def ttft(self) -> float | None:
        """Time to first token: from sending to the first token chunk."""
        return self.chunk_times[0] - self.start if self.chunk_times else None

    def e2el(self) -> float:
        """End-to-end latency: from sending to the last chunk with a choice."""
        return self.end - self.start

    def tpot(self) -> float | None:
        """Time per output token after the first."""
        if self.output_tokens < 2 or len(self.chunk_times) < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    def itl(self) -> list[float]:
        """Inter-token latency as other tools count it: the time between neighbouring token chunks."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]

    def token_itl(self) -> list[float] | None:
        """One value per token after the first chunk: the gap before its chunk divided by the chunk's tokens.

        A chunk without tokens (text held back until the end) passes its gap on to the next one with tokens.
        None where the tokens per chunk are unknown.
        """
        counts = self.tokens_per_chunk()
        if counts is None:
            return None
        values: list[float] = []
        carried = 0.0
        for gap, count in zip(self.itl(), counts[1:], strict=True):
            carried += gap
            if count:
                values += [carried / count] * count
                carried = 0.0
        return values
