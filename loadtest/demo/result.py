"""What a demo found: the table, the plot and the line for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from slipstream.loadtest.demo.heldout import Answers
from slipstream.loadtest.demo.machine import break_even, verdict
from slipstream.loadtest.demo.plan import DEPTH, DemoOptions
from slipstream.loadtest.demo.watch import Watch
from slipstream.loadtest.plots import Line, Panel, write_plot


@dataclass(frozen=True, slots=True)
class Measured:
    """Held-out prompts, one stream, greedy."""

    off: Answers
    """Answers without drafting, in turn with those of ``head``."""
    head: Answers
    """Answers with the head, of whose draft tokens the server verifies as many as it finds worth it."""
    depth: Answers
    """Answers with all draft tokens of every chain of the head verified."""

    @property
    def speedup(self) -> float:
        return self.head.tokens_per_second / self.off.tokens_per_second if self.off.tokens_per_second else 0.0


@dataclass(frozen=True, slots=True)
class Glance:
    """A few of the held-out prompts, between two bursts of traffic."""

    minute: float
    accept_length: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    options: DemoOptions
    minutes: float
    before: Measured
    after: Measured
    offline_accept_length: float | None
    """The gate's figure for the live version and the held-out answers; None without a live version."""
    watch: Watch
    glances: Sequence[Glance]
    sent: int
    failed: int
    replayed_tokens: int

    @property
    def differing(self) -> int:
        """Held-out answers that are not the same with drafting and without: there must be none."""
        first = self.before.off.texts
        others = (self.before.head, self.before.depth, self.after.off, self.after.head, self.after.depth)
        return sum(len(set(texts)) > 1 for texts in zip(first, *(each.texts for each in others), strict=True))

    @property
    def ok(self) -> bool:
        return self.offline_accept_length is not None and not self.failed and not self.differing

    def fields(self) -> dict[str, Any]:
        watch, options = self.watch, self.options
        live = next((each for each in watch.versions if each["version"] == watch.live), None)
        return {
            "minutes": round(self.minutes, 2),
            "workload": options.workload,
            "evolve": options.evolve,
            "drafter": options.drafter,
            "heldout_prompts": options.heldout,
            "before": _fields(self.before),
            "after": _fields(self.after),
            "offline_accept_length": self.offline_accept_length,
            "gate_accept_length": live["manifest"]["gate"].get("accept_length") if live else None,
            "version": watch.live,
            "swaps": [{"minute": round(swap.minute, 2), "version": swap.version} for swap in watch.swaps],
            "versions": dict(Counter(each["state"] for each in watch.versions)),
            "rounds": watch.evolution.get("worker", {}).get("rounds", {}),
            "break_even_accept_length": break_even(watch.machine),
            "learned_positions": watch.learned,
            "training_positions_per_second": round(watch.training_rate, 1),
            "replayed_tokens": self.replayed_tokens,
            "requests": self.sent,
            "failed": self.failed,
            "differing_answers": self.differing,
            "glances": [
                [round(g.minute, 2), round(g.accept_length, 4), round(g.tokens_per_second, 2)] for g in self.glances
            ],
        }


def _fields(measured: Measured) -> dict[str, float]:
    return {
        "accept_length": round(measured.depth.accept_length, 4),
        "live_accept_length": round(measured.head.accept_length, 4),
        "tokens_per_second": round(measured.head.tokens_per_second, 2),
        "tokens_per_second_off": round(measured.off.tokens_per_second, 2),
        "ratio": round(measured.speedup, 4),
    }


def print_result(result: Result, console: Console) -> None:
    fields = result.fields()
    before, after = fields["before"], fields["after"]
    table = Table("held-out prompts, 1 stream, greedy", "before", "after")
    rows = (
        (f"accept length, chains of {DEPTH}", "accept_length", "{:.2f}"),
        ("accept length where the server decides", "live_accept_length", "{:.2f}"),
        ("tokens per second with the head", "tokens_per_second", "{:.1f}"),
        ("tokens per second, speculation off", "tokens_per_second_off", "{:.1f}"),
        ("ratio", "ratio", "{:.2f}×"),
    )
    for name, key, shape in rows:
        table.add_row(name, shape.format(before[key]), shape.format(after[key]))
    if result.offline_accept_length:
        table.add_row("accept length, computed offline on the same answers", "", f"{result.offline_accept_length:.2f}")
        ratio = after["accept_length"] / result.offline_accept_length - 1
        table.add_row("live against offline", "", f"{ratio:+.1%}")
    if fields["gate_accept_length"]:
        table.add_row("accept length the gate saw on its traffic", "", f"{fields['gate_accept_length']:.2f}")
    console.print(table)
    outcomes = Table(show_header=False)
    live = " → ".join([result.options.drafter, *(str(swap.version) for swap in result.watch.swaps)])
    outcomes.add_row("live versions", live)
    outcomes.add_row("versions by state", _counts(fields["versions"]))
    outcomes.add_row("rounds of training", _counts(fields["rounds"]))
    learned = f"{fields['learned_positions']:,} positions, {fields['training_positions_per_second']:.0f} per second"
    outcomes.add_row("learned", learned)
    outcomes.add_row("traffic", f"{result.replayed_tokens:,} tokens of answers")
    outcomes.add_row("failed requests", f"{result.failed} of {result.sent}")
    outcomes.add_row("answers that drafting changed", str(result.differing))
    console.print(outcomes)
    if result.watch.live:
        said = verdict(result.watch.machine, result.after.depth.accept_length, result.after.speedup)
        console.print(said, highlight=False)
    elif result.watch.rounds:
        console.print("No version passed the gate in this time: give it more --minutes.")
    else:
        console.print(
            "No round of training ended in this time, since training gets what other programs leave of the processor: "
            "give it more --minutes, or end what else runs on this machine.",
            highlight=False,
        )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def plot_result(result: Result) -> None:
    """Writes the file that the options name."""
    glances, options = result.glances, result.options
    first, last = glances[0].minute, glances[-1].minute
    length = [(glance.minute, glance.accept_length) for glance in glances]
    rate = [(glance.minute, glance.tokens_per_second) for glance in glances]
    off = [
        (first, result.before.off.first(options.glance).tokens_per_second),
        (last, result.after.off.first(options.glance).tokens_per_second),
    ]
    marks = [(swap.minute, str(swap.version)) for swap in result.watch.swaps]
    title = f"slipstream demo: {options.workload}, {result.minutes:.0f} minutes; dashed: a version goes live"
    panels = (
        Panel(
            f"The first {options.glance} held-out prompts, 1 stream",
            "accept length",
            [Line("with the head", length)],
            1.0,
            marks,
        ),
        Panel("", "tokens per second", [Line("with the head", rate), Line("speculation off", off)], 0.0, marks),
    )
    write_plot(options.plot, title, "minutes", panels)
