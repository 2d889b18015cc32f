"""What the dashboard draws and what drift is judged by: speed and acceptance over time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

from slipstream.engine.messages import EngineStats
from slipstream.server.telemetry.sequence_metrics import SequenceMetrics

POINTS = 720
FIRST_INTERVAL = 2.0
"""Seconds between points; doubles, and every other point goes, whenever there are too many."""
DRIFT_BELOW = 0.85
"""Live tokens per step, of one draft token each, over what the gate saw: below, the traffic is another one now."""
DRIFT_REQUESTS = 100
"""Requests that are compared, the latest."""
DRIFT_PROPOSALS = 400
"""At least so many proposals have to be known of them: then the share of right ones is known to within 0.05."""
QUIET_STREAMS = 4
"""Most streams at which as many draft tokens are verified as the gate counted on."""
USE_MEMORY = 0.999
"""How much each second before counts in the distribution of streams."""


@dataclass(frozen=True, slots=True)
class Point:
    """An interval: its end in seconds since 1970."""

    time: float
    tokens_per_second: float
    accept_length: float
    """Tokens per step and stream; 0 where nothing ran."""
    running: int
    version: int
    """Live on the shared route."""


class Observer:
    """Speed and acceptance over time, with or without a registry."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        """With times of the monotonic clock: the other one may be put back, and a chart would go back, too."""
        self._interval = FIRST_INTERVAL
        self._last: tuple[float, int] | None = None
        self._steps = self._tokens = 0
        self._lengths: deque[tuple[int, int]] = deque(maxlen=DRIFT_REQUESTS)
        self._proposals: deque[tuple[int, int]] = deque(maxlen=DRIFT_REQUESTS)
        """By request: those of the live version, and how many had a right first draft token, verified or not."""
        self._version = 0
        self._use: dict[int, float] = {}
        self._drifted = False

    @property
    def points(self) -> list[Point]:
        """Oldest first, with times as the clock has them now."""
        ahead = time.time() - time.monotonic()
        return [replace(point, time=point.time + ahead) for point in self._points]

    def look(self, stats: EngineStats, version: int) -> None:
        """Called every second or so."""
        if stats.num_running:
            for streams in self._use:
                self._use[streams] *= USE_MEMORY
            self._use[stats.num_running] = self._use.get(stats.num_running, 0.0) + 1
        now = time.monotonic()
        if self._last is None:
            self._last = now, stats.generation_tokens
            return
        began, tokens = self._last
        if now - began < self._interval:
            return
        length = 1 + self._tokens / self._steps if self._steps else 0.0
        rate = (stats.generation_tokens - tokens) / (now - began)
        self._points.append(Point(now, rate, length, stats.num_running, version))
        self._last = now, stats.generation_tokens
        self._steps = self._tokens = 0
        if len(self._points) > POINTS:
            self._points = self._points[1::2]
            self._interval *= 2

    def ended(self, version: int, running: int, metrics: SequenceMetrics) -> None:
        """A sequence has ended that this version drafted for, and others; the gate knows its draft tokens only."""
        self._steps += metrics.steps
        self._tokens += metrics.num_accepted
        if version != self._version:
            self._version, self._drifted = version, False
            self._lengths.clear()
            self._proposals.clear()
        if running <= QUIET_STREAMS and metrics.learned_steps:
            self._lengths.append((metrics.learned_steps, metrics.learned_accepted))
        if metrics.proposals:
            self._proposals.append((metrics.proposals, metrics.first_right))

    @property
    def accept_length(self) -> float:
        """Tokens per step of the latest requests on the live version, with few streams; 0 where too little is known."""
        if len(self._lengths) < DRIFT_REQUESTS // 4:
            return 0.0
        return 1 + sum(accepted for _, accepted in self._lengths) / sum(steps for steps, _ in self._lengths)

    @property
    def first_right(self) -> float | None:
        """Share of the latest proposals of the live version whose first draft token was right; None: too few are known.

        Unlike accept lengths it does not depend on how many draft tokens are worth being verified, which may be none.
        """
        proposals = sum(count for count, _ in self._proposals)
        enough = len(self._proposals) >= DRIFT_REQUESTS // 4 and proposals >= DRIFT_PROPOSALS
        return sum(right for _, right in self._proposals) / proposals if enough else None

    def drift(self, expected: float | None) -> float:
        """Live tokens per step, with one draft token each, over what the gate saw if it saw this share of first ones
        right; 1 where too little is known."""
        live = self.first_right
        return 1.0 if live is None or expected is None else (1 + live) / (1 + expected)

    def has_drifted(self, expected: float | None) -> bool:
        """Says so once per version."""
        if self._drifted or len(self._proposals) < DRIFT_REQUESTS or self.drift(expected) >= DRIFT_BELOW:
            return False
        self._drifted = True
        return True

    @property
    def use(self) -> dict[int, float]:
        """Share of the time with so many streams, of the time with any."""
        total = sum(self._use.values())
        return {streams: count / total for streams, count in self._use.items()} if total else {}
