"""What a demo does and with which settings of the server; docs/evolution.md says why."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from slipstream.loadtest.plots import require_plot

DemoWorkload = Literal["sharegpt", "extract"]
DEPTH = 3
"""Draft tokens in a chain."""
EPOCHS = 3.0
"""How often each token of an answer is learned in the end. In the beginning once: of few texts a head learns more than
it should, and early answers are worth as much as late ones, only sooner."""
LONGEST_BURST = 0.5
"""Share of the time left that traffic between two rounds may take."""
LEAST_LEARNING = 0.4
"""Share of the whole time, even where measuring takes so long that it will be over."""
GRACE = 1.0
"""Longest extension where not even one round of training has ended by then; share of the whole time."""
SETTLE = 0.05
"""Share of the whole time for the last gate and the last trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    minutes: float = 30.0
    workload: DemoWorkload = "sharegpt"
    folder: Path
    """Gets the registry, the traffic, the held-out traffic and the log."""
    plot: Path
    port: int
    model: str = "default"
    drafter: str = "cold"
    """Where learning begins: a head that has learned nothing, ``warm``, the one that comes with the default model, or a
    folder."""
    evolve: Literal["idle", "always"] = "idle"
    streams: int = 32
    """Streams of the traffic."""
    output_tokens: int = 128
    seed: int = 0
    dataset: Path | None = None

    def __post_init__(self) -> None:
        if self.workload not in get_args(DemoWorkload):
            raise ValueError(f"--workload {self.workload}: there are {', '.join(get_args(DemoWorkload))}")
        if self.evolve not in ("idle", "always"):
            raise ValueError(f"--evolve {self.evolve}: idle or always")
        if not math.isfinite(self.minutes):
            raise ValueError(f"--minutes {self.minutes}: say how many")
        if self.minutes < 1:
            raise ValueError(f"--minutes {self.minutes:g}: nothing is learned in less than one")
        require_plot(self.plot)
        if (self.folder / "registry").exists() or (self.folder / "traffic").exists():
            raise ValueError(f"--folder {self.folder} holds an earlier demo: it would not begin anew")

    @property
    def heldout(self) -> int:
        """Prompts that are only measured; 30 minutes have time for 24 of them, four times."""
        return round(min(max(0.8 * self.minutes, 3), 24))

    @property
    def glance(self) -> int:
        """Held-out prompts that are measured after every swap."""
        return min(max(self.heldout // 4, 2), 4)

    @property
    def first_tokens(self) -> int:
        return round(min(max(350 * self.minutes, 1000), 10_000))

    @property
    def round_tokens(self) -> int:
        return round(min(max(6600 * self.minutes, 4000), 200_000))

    def wanted_tokens(self, learned: int) -> float:
        """Tokens of answers for the next round to learn from, once so many positions were learned."""
        next_round = min(max(learned, self.round_tokens // 4), self.round_tokens)
        epochs = 1 + (EPOCHS - 1) * min(learned / (4 * self.round_tokens), 1)
        return max((learned + next_round) / epochs, 1.5 * self.first_tokens)

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def serve(self) -> list[str]:
        """The server that learns."""
        options = {
            "--registry": self.registry,
            "--traffic-log": "features",
            "--traffic-folder": self.folder / "traffic",
            "--evolve": self.evolve,
            "--evolve-first-tokens": self.first_tokens,
            "--evolve-round-tokens": self.round_tokens,
            "--canary-share": 0.5,
            "--canary-requests": 20,
            "--drafter": self.drafter,
            "--speculation": "auto",
            "--max-draft-tokens": DEPTH,
            "--kv-cache-memory": "512MiB",
        }
        return self._command(options)

    def probe(self, drafter: str, traffic: Path) -> list[str]:
        """A server that verifies three draft tokens of one head in every step, and keeps what it answers.

        Without a prefix cache hidden states of the whole prompt are kept: offline, the head sees what it saw live.
        """
        options = {
            "--drafter": drafter,
            "--speculation": "head",
            "--speculation-policy": "fixed",
            "--max-draft-tokens": DEPTH,
            "--traffic-log": "features",
            "--traffic-folder": traffic,
            "--kv-cache-memory": "128MiB",
        }
        return [*self._command(options), "--no-prefix-caching"]

    def _command(self, options: dict[str, object]) -> list[str]:
        given = {"--model": self.model, "--port": self.port} | options
        pairs = [str(part) for pair in given.items() for part in pair]
        return [sys.executable, "-P", "-m", "slipstream.server", "serve", *pairs]

    def evaluate(self, version: int, traffic: Path) -> list[str]:
        """Scores a version offline on what a probe answered."""
        command = [sys.executable, "-P", "-m", "slipstream.server", "drafter", "eval", str(version), "--all", "--json"]
        options = {"--registry": self.registry, "--traffic-folder": traffic, "--model": self.model, "--depth": DEPTH}
        return command + [str(part) for pair in options.items() for part in pair]

    def version_folder(self, version: int) -> Path:
        return self.registry / "versions" / f"{version:06d}"

    def learning_ends(self, began: float, now: float) -> float:
        """Seconds on the clock of ``began`` and ``now``; afterwards, measuring takes as long as it did until now."""
        whole = 60 * self.minutes
        return max(began + whole * (1 - SETTLE) - 1.1 * (now - began), now + LEAST_LEARNING * whole)
