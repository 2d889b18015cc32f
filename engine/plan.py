"""What the scheduler and the runner tell each other: plain data, no requests and no tensors.

One unit of work covers everything: *compute these positions of this row*. A prompt chunk, a decode step and the
recomputation after a preemption differ only in the number of positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.engine.messages import DrafterStats, NewRequest, TokenLogprobs

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step has to do, as far as its time depends on it."""

    tokens: int = 0
    """Positions computed."""
    reads: int = 0
    """Cached positions read: per segment once, its length after the step."""
    pairs: int = 0
    """Pairs of a computed position and one it attends to."""

    def add(self, start: int, count: int) -> StepWork:
        """This work and a segment of ``count`` positions from ``start`` on."""
        return StepWork(self.tokens, self.reads + start, self.pairs).extend(start, count)

    def extend(self, start: int, count: int) -> StepWork:
        """This work and ``count`` more positions, from ``start`` on, in a segment that is counted already.

        A negative count takes the positions before ``start`` away again.
        """
        pairs = count * start + count * (count + 1) // 2
        return StepWork(self.tokens + count, self.reads + count, self.pairs + pairs)


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request enters (or re-enters) a row of the runner's table."""

    slot: int
    request: NewRequest
    tokens: list[int]
    """Known tokens: the prompt, and the output so far after a preemption."""
    seed: int
    """Seed of the request's random stream."""
    adapter: int = 0
    """Number of the adapter it is computed with; 0 for none."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedAdapter:
    """A LoRA that requests are computed with; it is there as long as one of them has it."""

    number: int
    """In batches, from 1 on; another one's, too, once no request has this one any more."""
    key: str
    """Names what it computes: no other one ever has it."""


PLAIN = LoadedAdapter(0, "")
"""The model as it is."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. The lists of the second group are parallel: entry i is about row ``slots[i]``."""

    step: int
    new: list[NewRow]
    blocks: list[tuple[int, int, list[int]]]
    """(slot, index of the first, block ids) newly mapped."""
    copies: list[tuple[int, int]]
    """Cache blocks to copy before anything else, (source, destination)."""

    ended: list[tuple[int, int]]
    """(slot, length) of requests that have ended since the last plan, with so many tokens: what was sampled beyond
    them does not count. The slots may be among the new ones."""

    slots: list[int]
    starts: list[int]
    """First position to compute. A row that samples ends with its last known token, wherever that is by then: while the
    step before is under way, nobody knows how many of its draft tokens are right, and this is where it starts at most.
    """
    counts: list[int]
    """Positions of known tokens to compute."""
    drafts: list[int]
    """Positions besides of draft tokens to verify, at most: the first ones of what is proposed for the row by then."""
    samples: list[bool]
    """Whether to sample the next token after the last known one, and after each accepted draft token."""
    wanted: list[int]
    """Draft tokens to propose, at most, after this step."""
    costly: list[int]
    """The same by drafters that compute with a network; 0: they are not asked for the row."""

    work: StepWork
    """What the cost model predicts and learns from."""

    @property
    def num_tokens(self) -> int:
        return self.work.tokens

    def work_with(self, drafted: list[int]) -> StepWork:
        """What the step had to do with so many draft tokens per row, which may be fewer than were planned."""
        work = self.work
        if drafted != self.drafts:
            rows = zip(self.starts, self.counts, self.drafts, drafted, strict=True)
            for start, count, most, found in rows:
                work = work.extend(start + count + most, found - most)
        return work


class FirstDraft(NamedTuple):
    """The first draft token that a learned drafter had proposed, verified or not.

    That is what a version can be judged by at any load, because it does not matter how many are verified.
    """

    version: int = 0
    """The drafter's; 0 if none had proposed anything."""
    is_right: bool = False


NO_DRAFT = FirstDraft()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Parallel to the plan's rows."""

    tokens: list[list[int]]
    """Sampled tokens per row: none where none was asked for, else one more than draft tokens were accepted."""
    drafted: list[int]
    """Draft tokens that were verified per row."""
    offers: list[tuple[float, ...]]
    """Per row: what is proposed now, as the probability that draft token i and all before it are right."""
    logprobs: dict[int, list[TokenLogprobs]]
    """Log-probabilities by row index, one per sampled token, for requests that want them."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """Log-probabilities by row index, of the prompt tokens that follow the positions computed in this step."""
    errors: dict[int, str]
    """Errors by row index: no token could be sampled, or log-probabilities could not be told."""
    seconds: float
    """Wall time of the step."""
    draft_seconds: float = 0.0
    """Wall time of proposing, not part of ``seconds``."""
    drafters: list[DrafterStats] = field(default_factory=list)
    model_seconds: float = 0.0
    """Share of ``seconds`` that the model and sampling took."""
    overhead_cpu_seconds: float = 0.0
    """CPU time of this thread besides the model and sampling."""
    refused: frozenset[int] = frozenset()
    """Row indices with errors that are what the request asks for."""
    shortened: frozenset[int] = frozenset()
    """Row indices whose output could not go on as its grammar wants because of max_tokens; see Constraint."""
    pooled: dict[int, Float64] = field(default_factory=dict)
    """By row index, for requests that want an embedding: the sum over positions of this step that count."""
    first_drafts: dict[int, FirstDraft] = field(default_factory=dict)
    """By row index, where a learned drafter had proposed something."""
