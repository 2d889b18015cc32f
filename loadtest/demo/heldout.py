"""Held-out prompts, one at a time: tokens per second and accept length, of nothing that is ever learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from slipstream.clients.errors import ClientError
from slipstream.loadtest.harness import Target
from slipstream.loadtest.workloads import Request

Mode = Literal["off", "head"]


@dataclass(frozen=True, slots=True)
class Answer:
    seconds: float
    """Time from sending to the whole answer."""
    tokens: int
    accepted: int
    """Draft tokens that were accepted."""
    text: str


class Answers:
    """Answers to several prompts, in their order."""

    def __init__(self, answers: Sequence[Answer] = ()) -> None:
        self.answers = list(answers)

    @property
    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(answer.seconds for answer in self.answers)
        return sum(answer.tokens for answer in self.answers) / seconds if seconds else 0.0

    @property
    def accept_length(self) -> float:
        """Tokens per step after the first token of each answer, as the gate counts; 1 without drafting."""
        tokens = sum(max(answer.tokens - 1, 0) for answer in self.answers)
        steps = tokens - sum(answer.accepted for answer in self.answers)
        return tokens / steps if steps > 0 else 1.0

    def first(self, count: int) -> Answers:
        return Answers(self.answers[:count])


class HeldOut:
    """A fixed set of prompts; counts what fails."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.sent = self.failed = 0
        self._rounds = 0

    async def measure(self, target: Target, mode: Mode, count: int | None = None) -> Answers:
        self._rounds += 1
        return Answers([await self._ask(target, request, mode) for request in self.requests[:count]])

    async def compare(self, target: Target) -> tuple[Answers, Answers]:
        """Answers without and with the head, in turn; every other prompt begins with the head."""
        self._rounds += 1
        found: dict[Mode, list[Answer]] = {"off": [], "head": []}
        for number, request in enumerate(self.requests):
            order: tuple[Mode, ...] = ("off", "head") if number % 2 == 0 else ("head", "off")
            for mode in order:
                found[mode].append(await self._ask(target, request, mode))
        return Answers(found["off"]), Answers(found["head"])

    async def _ask(self, target: Target, request: Request, mode: Mode) -> Answer:
        body: dict[str, Any] = {
            **request.body,
            "model": target.model,
            "temperature": 0,
            "speculation": {"mode": mode},
            "return_metrics": True,
            # A prompt that was computed before would not be computed again.
            "cache_salt": f"{self._rounds} {mode}",
        }
        self.sent += 1
        start = perf_counter()
        try:
            reply = await target.client.chat(body)
        except ClientError:
            self.failed += 1
            return Answer(0.0, 0, 0, "")
        seconds = perf_counter() - start
        accepted = reply["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
        text = reply["choices"][0]["message"]["content"] or ""
        return Answer(seconds, reply["usage"]["completion_tokens"], accepted, text)
