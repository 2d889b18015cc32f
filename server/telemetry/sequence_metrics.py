"""What one sequence, and one answer, took."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from prometheus_client import Histogram

from slipstream.engine.messages import FinishReason, TokenDelta
from slipstream.server.telemetry.metrics import Metrics


class SequenceMetrics:
    """The clock of one sequence."""

    __slots__ = (
        *(
            "_cached",
            "_is_timed",
            "_metrics",
            "_prompt_tokens",
            "accepted",
            "arrival",
            "first",
            "last",
            "scheduled",
            "tokens",
        ),
        *("first_right", "learned_accepted", "learned_steps", "preemptions", "proposals", "steps", "versions"),
    )

    def __init__(self, metrics: Metrics, arrival: float, prompt_tokens: int, is_offline: bool = False) -> None:
        """Times of offline sequences say nothing, and are not counted."""
        self._metrics = metrics
        self._is_timed = not is_offline
        self.arrival = arrival
        self._prompt_tokens = prompt_tokens
        self.scheduled = 0.0
        self.first = 0.0
        self.last = 0.0
        self.tokens = 0
        self.steps = 0
        """Steps after the one that brought the first token."""
        self.learned_steps = self.learned_accepted = 0
        """Steps but for those that verified another drafter's tokens, and accepted draft tokens of the learned one."""
        self.proposals = self.first_right = 0
        """Proposals of the learned drafter, verified or not, and how many of them had a right first draft token."""
        self.preemptions = 0
        """How often it was preempted, once the engine has said it at the end."""
        self._cached = 0
        self.accepted: list[tuple[int, int]] = []
        """(verified, accepted) draft tokens per step that verified any."""
        self.versions: set[int] = set()
        """Versions of the learned drafter whose draft tokens were verified."""

    def on_delta(self, delta: TokenDelta) -> None:
        self._begin(delta)
        if count := len(delta.tokens):
            now = time.monotonic()
            if not self.first:
                self.first = now
                self._time(self._metrics.first_token, now - self.arrival)
            else:
                self.steps += 1
                self.learned_steps += bool(delta.drafter_version) or not delta.num_drafted
                self.proposals += bool(delta.drafter_version)
                self.first_right += delta.first_right
                gap = (now - self.last) / count
                for _ in range(count):
                    self._time(self._metrics.between_tokens, gap)
            self.last = now
            self.tokens += count
        if delta.num_drafted:
            self.accepted.append((delta.num_drafted, delta.num_accepted))
            if delta.drafter_version:
                self.versions.add(delta.drafter_version)
                self.learned_accepted += delta.num_accepted

    def on_last(self, delta: TokenDelta) -> None:
        """The engine is done with it, and says what only it knows.

        Of what was ended from outside (by a stop string, or since the client has gone) this comes after ``on_end``.
        """
        self._begin(delta)
        self.preemptions = delta.num_preemptions
        self._metrics.preemptions.observe(delta.num_preemptions)
        self._metrics.computed_tokens.observe(self._prompt_tokens - self._cached if self.scheduled else 0)

    def _begin(self, delta: TokenDelta) -> None:
        if delta.scheduled_at and not self.scheduled:
            self.scheduled = delta.scheduled_at
            self._cached = delta.num_cached_tokens
            self._time(self._metrics.queue_time, delta.scheduled_at - self.arrival)

    def _time(self, histogram: Histogram, seconds: float) -> None:
        if self._is_timed:
            histogram.observe(seconds)

    @property
    def num_accepted(self) -> int:
        """Draft tokens that were accepted."""
        return sum(right for _, right in self.accepted)

    def on_end(self, reason: FinishReason) -> None:
        metrics = self._metrics
        metrics.finished(reason)
        self._time(metrics.end_to_end, time.monotonic() - self.arrival)
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.generation_tokens.observe(self.tokens)
        if self.first and self.scheduled:
            self._time(metrics.prefill_time, self.first - self.scheduled)
            self._time(metrics.decode_time, self.last - self.first)
            self._time(metrics.inference_time, self.last - self.scheduled)
        if self.tokens > 1:
            self._time(metrics.per_token, (self.last - self.first) / (self.tokens - 1))


def sequences_metrics(sequences: list[SequenceMetrics]) -> dict[str, Any]:
    """Metrics of all sequences of an answer together, under the names that vLLM uses; times in milliseconds."""
    begun = [sequence for sequence in sequences if sequence.first]
    first = min((sequence.first for sequence in begun), default=0.0)
    last = max((sequence.last for sequence in begun), default=0.0)
    tokens = sum(sequence.tokens for sequence in sequences)
    gaps = sum(sequence.tokens - 1 for sequence in begun)
    between = sum(sequence.last - sequence.first for sequence in begun)
    verified = [step for sequence in sequences for step in sequence.accepted]
    histogram = Counter(accepted for _, accepted in verified)
    drafted, accepted = sum(step[0] for step in verified), sum(step[1] for step in verified)
    arrival = sequences[0].arrival
    queue = min((sequence.scheduled for sequence in begun), default=arrival) - arrival
    return {
        "time_to_first_token_ms": _ms(first - arrival) if begun else None,
        "generation_time_ms": _ms(last - first),
        "queue_time_ms": _ms(queue),
        "mean_itl_ms": _ms(between / gaps) if gaps else None,
        "tokens_per_second": round(tokens / (last - first), 3) if last > first else None,
        "speculative_decoding": {
            "mean_acceptance_length": round(1 + accepted / len(verified), 4) if verified else 1.0,
            "draft_acceptance_rate": round(accepted / drafted, 4) if drafted else 0.0,
            "acceptance_histogram": [histogram[count] for count in range(max(histogram, default=-1) + 1)],
            "num_spec_steps": len(verified),
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "drafter_versions": sorted({version for sequence in sequences for version in sequence.versions}),
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
