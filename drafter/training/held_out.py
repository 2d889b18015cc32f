"""What a verdict of the gate rests on: texts that training has not seen, and repeats as often as traffic repeats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slipstream.drafter.training.packing import Example

WINDOW = 8
"""Tokens in a row that count as a common part."""
ALIKE = 0.5
"""Share of the shorter answer's windows that two answers of one kind have in common."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    examples: list[Example]
    weights: NDArray[np.float64]
    """[texts]; together they have the traffic's share of repeats."""
    repeated: float = 0.0
    """Share of the recent traffic that was asked before."""
    groups: NDArray[np.int64] = field(init=False)
    """[texts]: the same number for texts that hardly differ, see ``alike``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", alike(self.examples))

    @property
    def different(self) -> int:
        """How many texts there are, each kind counted once."""
        return len(np.unique(self.groups))


def alike(texts: Sequence[Example]) -> NDArray[np.int64]:
    """The number of each text's kind: with the same prompt, or an answer half of which comes in the other one, too.

    Joined in chains (single linkage). Answers too short to have a window are told apart by their prompts only.
    """
    kinds = list(range(len(texts)))

    def find(text: int) -> int:
        while kinds[text] != text:
            kinds[text] = text = kinds[kinds[text]]
        return text

    prompts: dict[bytes, int] = {}
    answers: dict[bytes, int] = {}
    windows = [_windows(text) for text in texts]
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        first = prompts.setdefault(text.tokens[: text.num_prompt].tobytes(), number)
        kinds[find(number)] = find(first)
        if not windows[number]:
            continue
        first = answers.setdefault(text.tokens[text.num_prompt :].tobytes(), number)
        if first != number:  # a repeat is like all that the first one is like
            kinds[find(number)] = find(first)
            continue
        shared: defaultdict[int, int] = defaultdict(int)
        for window in windows[number]:
            for other in places[window]:
                shared[other] += 1
            places[window].append(number)
        for other, count in shared.items():
            if count >= ALIKE * min(len(windows[number]), len(windows[other])):
                kinds[find(number)] = find(other)
    return np.array([find(number) for number in range(len(texts))], np.int64)


def _windows(text: Example) -> set[bytes]:
    answer = text.tokens[text.num_prompt :]
    return {answer[at : at + WINDOW].tobytes() for at in range(len(answer) - WINDOW + 1)}
