"""Whether there is room for a request: within the limits of its principal, and in the queue, which all share fairly.

The queue is bounded by sequences and by prompt tokens that wait. Whoever holds less than his share of it is let in even
when it is full: so nobody can fill it for others. A share is one of as many as there are principals with open requests,
so a queue may hold more than its bound by as much as that takes, and for one principal alone the bound is exact.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from slipstream.server.access.account import Account
from slipstream.server.errors import InvalidRequestError, OverloadedError, RateLimitedError
from slipstream.server.telemetry.metrics import Metrics

REMEMBERED_ENDS = 64
SOONEST_RETRY_S, LATEST_RETRY_S = 1, 60


class Queued(Protocol):
    """A sequence, as far as the queue is concerned."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def has_begun(self) -> bool: ...

    @property
    def num_tokens(self) -> int: ...


class Admission:
    """Belongs to one event loop. Refusals are counted by their reason."""

    def __init__(
        self,
        most_sequences: int,
        most_queued_tokens: int,
        num_open: Callable[[], int],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            most_sequences: that may run or wait.
            most_queued_tokens: of prompts that wait; 0: any number.
            num_open: sequences that run or wait in the engine. Offline ones do not count, and are let in: whoever
                sends them sends as many as there are rows.
        """
        self._most = most_sequences
        self._most_tokens = most_queued_tokens
        self._num_open = num_open
        self._metrics = metrics
        self._clock = clock
        self._held: dict[Account, list[Sequence[Queued]]] = {}
        """Answers under way, by whose they are."""
        self._num_offline = 0
        self._ends: deque[float] = deque(maxlen=REMEMBERED_ENDS)
        """When the latest sequences ended."""

    def begin(self, account: Account) -> None:
        """Counts a request. Raises RateLimitedError if it is one too many for its principal."""
        with self._counting():
            account.begin_request()

    def require_room(self, account: Account, count: int, prompt_tokens: int = 0) -> None:
        """For so many sequences.

        Raises OverloadedError, RateLimitedError if there is none now, InvalidRequestError if there never is.
        """
        most = account.limits.max_concurrent or self._most
        if count > min(most, self._most):
            option = "--max-queued-requests" if most >= self._most else "max_concurrent of the key"
            raise InvalidRequestError(
                f"the request asks for {count} sequences; at most {min(most, self._most)} are taken ({option})",
                param="n",
            )
        if account.is_offline:
            return
        with self._counting():
            account.require_room(count)
            self._require_sequences(account, count)
            if self._most_tokens and prompt_tokens:
                self._require_tokens(account, prompt_tokens)

    def _require_sequences(self, account: Account, count: int) -> None:
        found = self._num_open() - self._num_offline
        if found + count > self._most and account.num_open + count > self._most / self._shares(account):
            raise OverloadedError(
                f"{found} sequences are running or waiting, and {count} more would exceed {self._most}",
                retry_after_s=self.seconds_until_room(found + count - self._most),
            )

    def _require_tokens(self, account: Account, count: int) -> None:
        waiting = {holder: sum(map(waiting_tokens, held)) for holder, held in self._held.items()}
        found, own = sum(waiting.values()), waiting.get(account, 0)
        share = self._most_tokens / self._shares(account)
        # A prompt that is longer than the bound waits alone.
        if own and found + count > self._most_tokens and own + count > share:
            raise OverloadedError(
                f"{found} prompt tokens wait, and {count} more would exceed {self._most_tokens} (--max-queued-tokens)",
                retry_after_s=self.seconds_until_room(1),
            )

    def _shares(self, account: Account) -> int:
        return len(self._held.keys() | {account})

    def seconds_until_room(self, sequences: int) -> int:
        """How long it takes until so many have ended, if they end as often as of late."""
        if not self._ends:
            return SOONEST_RETRY_S
        each = max(self._clock() - self._ends[0], 0.0) / len(self._ends)
        return min(max(math.ceil(sequences * each), SOONEST_RETRY_S), LATEST_RETRY_S)

    @contextmanager
    def holding(self, account: Account, sequences: Sequence[Queued], prompt_tokens: int) -> Iterator[None]:
        """Around the answer to a request that was let in."""
        if account.is_offline:
            self._num_offline += len(sequences)
            try:
                yield
            finally:
                self._num_offline -= len(sequences)
            return
        held = self._held.setdefault(account, [])
        held.append(sequences)
        try:
            with account.holding(
                len(sequences), prompt_tokens, lambda: sum(sequence.num_tokens for sequence in sequences)
            ):
                yield
        finally:
            held.remove(sequences)
            if not held:
                del self._held[account]
            self._ends.extend([self._clock()] * len(sequences))

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except RateLimitedError as error:
            self._metrics.rejected(error.reason)
            raise
        except OverloadedError:
            self._metrics.rejected("queue_full")
            raise


def waiting_tokens(sequences: Sequence[Queued]) -> int:
    """Tokens of the prompts of a request that wait; choices share theirs."""
    return sum(
        len(prompt) for prompt in {id(each.prompt): each.prompt for each in sequences if not each.has_begun}.values()
    )
