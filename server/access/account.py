"""What the requests of one principal take together, and what it may take: per minute, and at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slipstream.server.errors import RateLimitedError

MINUTE = 60.0
RETRY_CONCURRENT_S = 1
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class UsageLimits:
    """The most that all requests of a principal may take together; 0: as much as there is."""

    requests_per_minute: int = 0
    """Requests with a body."""
    tokens_per_minute: int = 0
    """Tokens of prompts and of answers."""
    max_concurrent: int = 0
    """Sequences that run or wait."""
    weight: float = 1.0
    """Share of the machine while others want it, too, in proportion to theirs."""


NO_LIMITS = UsageLimits()


class Allowance:
    """So much per minute, which comes back evenly. It may be overdrawn, and then has to come back first."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        """0: without end."""
        self.per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._at = clock()

    def resize(self, per_minute: int) -> None:
        """What was taken stays taken."""
        taken = self.per_minute - self.left
        self.per_minute = per_minute
        self._left = per_minute - taken if per_minute else 0.0

    @property
    def left(self) -> float:
        now = self._clock()
        come = (now - self._at) * self.per_minute / MINUTE
        self._at, self._left = now, min(float(self.per_minute), self._left + come)
        return self._left

    def take(self, amount: float) -> None:
        if self.per_minute:  # what there is no end of comes back at no pace
            self._left = self.left - amount

    def seconds_until(self, amount: float) -> float:
        """Until so much is left, if nothing is taken meanwhile."""
        missing = amount - self.left
        return max(0.0, missing * MINUTE / self.per_minute) if self.per_minute else 0.0


class Account:
    """The books of one principal. They outlive its keys, and changes of its limits."""

    def __init__(
        self, limits: UsageLimits = NO_LIMITS, clock: Clock = time.monotonic, is_offline: bool = False
    ) -> None:
        """``is_offline``: nobody waits for the answers, which get what others leave of the machine."""
        self.limits = limits
        self.is_offline = is_offline
        self.num_open = 0
        """Sequences whose answers are under way."""
        self._requests = Allowance(limits.requests_per_minute, clock)
        self._tokens = Allowance(limits.tokens_per_minute, clock)
        self._generated: set[Callable[[], int]] = set()
        """Tell how many tokens the answers under way have so far."""

    def change(self, limits: UsageLimits) -> None:
        self.limits = limits
        self._requests.resize(limits.requests_per_minute)
        self._tokens.resize(limits.tokens_per_minute)

    def begin_request(self) -> None:
        """Counts a request. Raises RateLimitedError, and counts none, if there were too many, or too many tokens."""
        if self.limits.requests_per_minute and self._requests.left < 1:
            most = f"{self.limits.requests_per_minute} requests"
            raise _too_many(f"{most} per minute", self._requests.seconds_until(1), "requests_per_minute")
        if self.limits.tokens_per_minute and (left := self._tokens_left) <= 0:
            wait = self._tokens.seconds_until(self._tokens.left - left + 1)
            raise _too_many(f"{self.limits.tokens_per_minute} tokens per minute", wait, "tokens_per_minute")
        self._requests.take(1)

    def require_room(self, sequences: int) -> None:
        """Raises RateLimitedError if so many more would be too many at a time."""
        most = self.limits.max_concurrent
        if most and self.num_open + sequences > most:
            raise _too_many(
                f"{most} sequences at a time; {self.num_open} are under way", RETRY_CONCURRENT_S, "max_concurrent"
            )

    @contextmanager
    def holding(self, sequences: int, prompt_tokens: int, generated: Callable[[], int]) -> Iterator[None]:
        """Around answers under way; ``generated`` tells how many tokens they have by now."""
        self.num_open += sequences
        self._tokens.take(prompt_tokens)
        self._generated.add(generated)
        try:
            yield
        finally:
            self.num_open -= sequences
            self._generated.remove(generated)
            self._tokens.take(generated())

    @property
    def _tokens_left(self) -> float:
        return self._tokens.left - sum(generated() for generated in self._generated)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, in the headers that OpenAI's API has; none where there are no limits."""
        found: list[tuple[bytes, bytes]] = []
        allowances = (("requests", self._requests, self._requests.left), ("tokens", self._tokens, self._tokens_left))
        for name, allowance, left in allowances:
            if allowance.per_minute:
                reset = (allowance.per_minute - left) * MINUTE / allowance.per_minute
                values = {"limit": allowance.per_minute, "remaining": max(0, math.floor(left)), "reset": _span(reset)}
                found += [
                    (f"x-ratelimit-{kind}-{name}".encode(), str(value).encode()) for kind, value in values.items()
                ]
        return found


def _too_many(allowed: str, wait_s: float, reason: str) -> RateLimitedError:
    return RateLimitedError(f"this key may have {allowed}", retry_after_s=max(1, math.ceil(wait_s)), reason=reason)


def _span(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{rest:.1f}s".replace(".0s", "s") if minutes else f"{rest:.1f}s".replace(".0s", "s")
