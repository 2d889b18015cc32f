"""What the training worker has told so far: its last line says only what it does now."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

LOSSES = 400
"""Kept for the chart; every other one goes when there are more."""


class Progress:
    """Counts over restarts of the worker."""

    def __init__(self) -> None:
        self.tokens = 0
        """Positions learned since the server's start."""
        self.rounds = Counter({"published": 0, "refused": 0})
        """Rounds of training, by what the gate said of their result."""
        self.training: dict[str, Any] = {}
        """The last report of a step of training."""
        self.verdict: dict[str, Any] = {}
        """The last report of the gate, also of versions from elsewhere."""
        self.losses: list[tuple[float, float]] = []
        """Time in seconds since 1970, loss."""
        self._reported = 0
        """Positions that the running worker last said it had learned since its start."""
        self._every = 1
        self._seen = 0

    def take(self, report: dict[str, Any]) -> None:
        """A line of the worker; see drafter/training/control.py."""
        tokens = report.get("tokens", 0)
        self.tokens += max(tokens - self._reported, 0)
        self._reported = tokens
        match report["state"]:
            case "training":
                self.training = report
                self._remember(report.get("loss", 0.0))
            case "published" | "refused" as outcome:
                self.verdict = report | {"time": time.time()}
                self.rounds[outcome] += not report.get("foreign", False)

    def status(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "rounds": dict(self.rounds),
            "training": self.training,
            "verdict": self.verdict,
            "losses": self.losses,
        }

    def _remember(self, loss: float) -> None:
        self._seen += 1
        if self._seen % self._every:
            return
        self.losses.append((time.time(), loss))
        if len(self.losses) > LOSSES:
            self.losses = self.losses[1::2]
            self._every *= 2
