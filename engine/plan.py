"""What the scheduler and the runner tell each other: plain data, no requests and no tensors.

One unit of work covers everything: *compute these positions of this row*. A prompt chunk, a decode step and the
recomputation after a preemption differ only in the number of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.engine.messages import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request enters (or re-enters) a row of the runner's tables."""

    slot: int
    tokens: list[int]
    """Known tokens: the prompt, and the output so far after a preemption."""
    num_prompt: int
    params: SamplingParams
    seed: int
    """Of the request's random stream."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. The lists of the second group are parallel: entry i is about row ``slots[i]``."""

    step: int
    new: list[NewRow]
    blocks: list[tuple[int, int, list[int]]]
    """(slot, index of the first, block ids) newly mapped."""
    copies: list[tuple[int, int]]
    """Cache blocks to copy before anything else, (source, destination)."""

    slots: list[int]
    starts: list[int]
    """First position to compute."""
    counts: list[int]
    """Positions to compute."""
    samples: list[bool]
    """Whether to draw the next token after the last of them."""

    context: int
    """Sum over all tokens of the positions they attend to; for the cost model."""

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Parallel to the plan's rows."""

    tokens: list[int]
    """Drawn token per row; -1 where none was asked for."""
    logprobs: dict[int, TokenLogprobs]
    """By row index, for requests that want them."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    """By row index: of the prompt tokens that follow the positions computed in this step."""
    errors: dict[int, str]
    """By row index: rows whose logits were not finite."""
    seconds: float
    """Wall time of the step."""
    model_seconds: float = 0.0
    """Of it, the model and drawing tokens."""
    overhead_cpu_seconds: float = 0.0
    """CPU time of this thread for the rest."""
