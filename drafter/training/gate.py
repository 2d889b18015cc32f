"""Whether a new head is better than the live one: measured on traffic that training has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, fill, pack
from slipstream.drafter.training.threads import Threads

ROWS = 1024
"""Positions scored at once."""
LONGEST = 4096
"""Positions of a text, its last ones."""
LEAST_TEXTS = 8
"""A bootstrap over fewer knows no noise."""
RESAMPLES = 2000
CONFIDENCE = 0.975
"""One-sided confidence of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Score:
    """What live drafting of chains would have had, per text and greatest number of draft tokens."""

    tokens: NDArray[np.int64]  # [texts]: of the answers, but for their first
    steps: NDArray[np.int64]  # [texts, 1 + depth]: verification steps with at most 0, 1, … draft tokens
    weights: NDArray[np.float64] | None = None  # [texts]; None: all the same

    def accept_length(self, depth: int) -> float:
        """Tokens per verification step over all texts, with at most ``depth`` draft tokens."""
        weights = np.ones(len(self.tokens)) if self.weights is None else self.weights
        steps = float(weights @ self.steps[:, depth])
        return float(weights @ self.tokens) / steps if steps else math.nan

    def without_drafting(self) -> Score:
        """The same texts with nobody drafting."""
        return Score(self.tokens, np.repeat(self.tokens[:, None], self.steps.shape[1], axis=1), self.weights)

    def weighted(self, weights: NDArray[np.float64]) -> Score:
        return Score(self.tokens, self.steps, weights)


@dataclass(frozen=True, slots=True)
class Speed:
    """What steps cost on the machine that serves, and how it is used."""

    step_seconds: Mapping[int, float]
    """Seconds of a step by positions computed; in between, linear."""
    draft_seconds: Mapping[int, Sequence[float]]
    """Time of proposing chains of 1, 2, … draft tokens, by how many streams they are proposed for; empty: none."""
    streams: Mapping[int, float]
    """Share of the time with so many streams."""

    def tokens_per_second(self, score: Score) -> float:
        """Predicted, with the best number of draft tokens at each number of streams."""
        sizes = sorted(self.step_seconds)
        seconds = [self.step_seconds[size] for size in sizes]
        depths = range(score.steps.shape[1])
        total = 0.0
        for streams, share in self.streams.items():
            costs = [float(np.interp(streams * (1 + d), sizes, seconds)) + self._drafting(streams, d) for d in depths]
            total += share * max(streams * score.accept_length(d) / cost for d, cost in zip(depths, costs, strict=True))
        return total / sum(self.streams.values())

    def _drafting(self, streams: int, depth: int) -> float:
        """Seconds of chains of so many; of the nearest number of streams of which they are known."""
        if not depth or not self.draft_seconds:
            return 0.0
        known = self.draft_seconds[min(self.draft_seconds, key=lambda number: abs(number - streams))]
        return known[min(depth, len(known)) - 1]


@dataclass(frozen=True, slots=True)
class Verdict:
    passes: bool
    accept_length: float
    live_accept_length: float
    least_ratio: float
    """The candidate's accept length over the live one's is at least this, with 97.5 % confidence, …"""
    most_ratio: float
    """… and at most this."""
    speedup: float
    """Predicted tokens per second, candidate over live; 1 where the machine's speed is not known."""
    texts: int
    first_right: float
    """Share of the candidate's first draft tokens that are right, where nothing but them is verified."""
    different: int
    """How many of the texts are not nearly the same as another one."""
    repeated: float = 0.0
    """Share of the traffic that was asked before; the texts have the same."""

    def describe(self) -> str:
        said = f"accept length {self.accept_length:.2f} against {self.live_accept_length:.2f} on {self.texts} texts"
        if self.different < self.texts:
            said += f", {self.different} of them different"
        if self.repeated:
            said += f", {self.repeated:.0%} asked before"
        if self.different < LEAST_TEXTS:
            said += f"; a verdict needs {LEAST_TEXTS} different ones"
        return said

    def metrics(self) -> dict[str, float]:
        """The figures of a verdict that the manifest keeps."""
        return {
            "accept_length": self.accept_length,
            "live_accept_length": self.live_accept_length,
            "least_ratio": self.least_ratio,
            "speedup": self.speedup,
            "texts": float(self.texts),
            "first_right": self.first_right,
            "different_texts": float(self.different),
            "repeated": self.repeated,
        }


def score(
    head: TrainableHead,
    examples: Sequence[Example],
    depth: int,
    threads: Threads | None = None,
    check: Callable[[], object] = lambda: None,
) -> Score:
    """Drafts along texts that are known, for chains of up to ``depth`` draft tokens.

    ``check`` is called before each part of about ``ROWS`` positions; what it raises ends the scoring.

    As long as all draft tokens before were right, draft token i is made after exactly the tokens that came: so one
    pass, which goes on where draft tokens were right, knows at every position how many of them are right there. The
    walk from the first position to the end of the answer, by one token more than are right at a time, visits the
    positions that live drafting starts from.
    """

    def walk(group: list[Example]) -> list[tuple[int, list[int]]]:
        check()
        batch = pack(group, depth, head.device)
        with torch.inference_mode():
            drafting = head.draft(batch)
            right = torch.zeros(len(batch.learned), dtype=torch.long, device=head.device)
            for step in range(depth):
                # argmax of bfloat16 takes six times as long on a CPU; ties go to the first in both.
                best = head.to_target[head.logits(drafting.hidden).max(-1).indices]
                is_right = drafting.counts & (best == batch.targets[drafting.rows, step])
                right[drafting.rows] += is_right
                if step + 1 < depth:
                    drafting.extend(is_right)
        known = right.cpu().numpy()
        found, at = [], 0
        for segment in batch.segments:
            count = segment.end - segment.learned
            found.append((count, [_walk(known[at : at + count], most) for most in range(depth + 1)]))
            at += count
        return found

    groups = (threads or Threads()).map(walk, fill(examples, ROWS, LONGEST))
    texts = [text for group in groups for text in group]
    tokens = np.array([count for count, _ in texts], np.int64)
    return Score(tokens, np.array([steps for _, steps in texts], np.int64).reshape(-1, depth + 1))


def judge(
    candidate: Score,
    live: Score,
    speed: Speed | None = None,
    margin: float = 0.0,
    groups: NDArray[np.int64] | None = None,
    repeated: float = 0.0,
) -> Verdict:
    """Paired bootstrap over groups of texts (Efron 1979): passes if better by more than ``margin`` beyond noise.

    Both must be scores of the same texts. Accept lengths are those with all draft tokens; with ``speed``, the predicted
    tokens per second must not fall either. Nothing passes on fewer than ``LEAST_TEXTS`` groups.

    Args:
        groups: [texts], the same number for texts that hardly differ, which know nothing of each other's noise: they
            are drawn together. None: all differ.
        repeated: for the verdict; see there.
    """
    assert np.array_equal(candidate.tokens, live.tokens), "scores of different texts"
    depth = candidate.steps.shape[1] - 1
    texts = len(candidate.tokens)
    if not texts:
        return Verdict(False, math.nan, math.nan, 0.0, math.inf, 1.0, 0, 0.0, 0)
    _, places = np.unique(np.arange(texts) if groups is None else groups, return_inverse=True)
    different = int(places.max()) + 1
    weights = np.ones(texts) if candidate.weights is None else candidate.weights
    known, found = (np.bincount(places, weights * each.steps[:, depth]) for each in (live, candidate))
    draws = np.random.default_rng(0).integers(0, different, (RESAMPLES, different))
    ratios = known[draws].sum(1) / found[draws].sum(1)
    least, most = np.quantile(ratios, (1 - CONFIDENCE, CONFIDENCE)).tolist()
    speedup = speed.tokens_per_second(candidate) / speed.tokens_per_second(live) if speed else 1.0
    passes = different >= LEAST_TEXTS and least > 1 + margin and speedup >= 1
    lengths = candidate.accept_length(depth), live.accept_length(depth)
    first_right = candidate.accept_length(1) - 1 if depth else 0.0
    return Verdict(passes, *lengths, least, most, speedup, texts, first_right, different, repeated)


def _walk(right: NDArray[np.int64], most: int) -> int:
    """Verification steps for an answer with so many right draft tokens at each position."""
    at = steps = 0
    while at < len(right):
        at += 1 + min(int(right[at]), most)
        steps += 1
    return steps
