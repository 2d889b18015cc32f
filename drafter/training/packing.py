"""Training pairs from traffic: several texts side by side, which neither see each other nor share positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.drafter.training.device import CPU


@dataclass(frozen=True, slots=True)
class Example:
    """One text to learn from. Position p of a head holds the features of position p and token p + 1."""

    tokens: NDArray[np.int32]
    num_prompt: int
    """Tokens before the answer; only drafting the answer is learned."""
    start: int
    """First position with features."""
    features: Tensor
    """[positions, taps, hidden] of positions start, start + 1, …"""
    likely: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None
    """The target's most likely tokens [answer, k] and their log-probabilities, per token of the answer."""

    @property
    def length(self) -> int:
        """Positions that a head can use: the token after the next one is known there."""
        return max(min(len(self.features), len(self.tokens) - 2 - self.start), 0)

    @property
    def num_context(self) -> int:
        """Positions before the first draft token of the answer: seen, not learned."""
        return max(self.num_prompt - 1 - self.start, 0)

    def cut(self, length: int) -> Example:
        """The last ``length`` positions; positions stay true."""
        left_out = max(self.length - length, 0)
        return Example(
            self.tokens, self.num_prompt, self.start + left_out, self.features[left_out : self.length], self.likely
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """One text in a pack: rows begin … end, of which the rows from ``learned`` on are learned."""

    begin: int
    learned: int
    end: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows are positions of all texts, one text after the other."""

    segments: tuple[Segment, ...]
    features: Tensor  # [rows, taps, hidden]
    positions: Tensor  # [rows] int64: true positions in each text
    tokens: Tensor  # [rows, 1 + steps] int64: tokens p + 1, p + 2, …; 0 beyond the end
    learned: Tensor  # [n] int64: rows to learn
    targets: Tensor  # [n, steps] int64: token p + 2 + step; -1 beyond the end
    likely: tuple[Tensor, Tensor] | None = None
    """Per target [n, steps, k]: the target's most likely tokens and their log-probabilities; -1 beyond the end."""


def pack(examples: Sequence[Example], steps: int, device: torch.device = CPU) -> Pack:
    """Lays texts side by side, on a device; ``steps`` is how many draft tokens in a row will be learned."""
    segments: list[Segment] = []
    rows = 0
    positions, tokens, targets, learned = [], [], [], []
    likely_ids, likely_logprobs = [], []
    for example in examples:
        length, context = example.length, example.num_context
        segments.append(Segment(rows, rows + context, rows + length))
        begin = example.start
        positions.append(np.arange(begin, begin + length))
        padded = np.concatenate((example.tokens, np.full(steps + 1, -1, np.int32)))
        windows = np.lib.stride_tricks.sliding_window_view(padded[begin + 1 :], steps + 1)[:length]
        tokens.append(np.maximum(windows, 0))
        targets.append(windows[context:, 1:])
        learned.append(np.arange(rows + context, rows + length))
        if example.likely is not None:
            # Target s of the learned row at position p is token p + 2 + s: entry p + 2 + s - num_prompt of the answer.
            first = begin + context + 2 - example.num_prompt
            places = first + np.arange(length - context)[:, None] + np.arange(steps)
            inside = places < len(example.likely[0])
            places = np.where(inside, places, 0)
            likely_ids.append(np.where(inside[..., None], example.likely[0][places], -1))
            likely_logprobs.append(example.likely[1][places])
        rows += length
    likely = None
    if likely_ids and len(likely_ids) == len(examples):
        likely = (
            torch.from_numpy(np.concatenate(likely_ids)).long().to(device),
            torch.from_numpy(np.concatenate(likely_logprobs)).float().to(device),
        )
    return Pack(
        tuple(segments),
        torch.cat([example.features[: example.length] for example in examples]).to(device),
        torch.from_numpy(np.concatenate(positions)).long().to(device),
        torch.from_numpy(np.concatenate(tokens)).long().to(device),
        torch.from_numpy(np.concatenate(learned)).long().to(device),
        torch.from_numpy(np.concatenate(targets)).long().to(device),
        likely,
    )


def fill(examples: Iterable[Example], rows: int, longest: int) -> Iterator[list[Example]]:
    """Groups of texts with about ``rows`` positions together; texts are cut to their last ``longest`` positions."""
    group: list[Example] = []
    size = 0
    for example in examples:
        example = example.cut(longest)
        if example.length - example.num_context <= 0:
            continue
        if group and size + example.length > rows:
            yield group
            group, size = [], 0
        group.append(example)
        size += example.length
    if group:
        yield group
