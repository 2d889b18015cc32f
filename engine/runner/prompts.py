"""What requests want to be told of their prompts: log-probabilities of tokens, and embeddings."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.plan import Float64
from slipstream.engine.runner.inputs import StepInputs
from slipstream.engine.runner.reported import report
from slipstream.engine.runner.rows import RowTable
from slipstream.engine.runner.sampler import NOT_FINITE, failure
from slipstream.kernels.batch import Int32
from slipstream.kernels.readback import sent

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once; a row is the size of the vocabulary."""


def prompt_logprobs_of(
    model: CausalModel, table: RowTable, inputs: StepInputs, hidden: Tensor
) -> tuple[dict[int, list[TokenLogprobs]], dict[int, str]]:
    """Log-probabilities of prompt tokens after the positions of this step, by row that asks; errors by row."""
    wanted: dict[int, list[TokenLogprobs]] = {}
    errors: dict[int, str] = {}
    plan = inputs.plan
    for row, slot in enumerate(plan.slots):
        params = table.params(slot)
        if params.prompt_logprobs is None:
            continue
        begin = int(inputs.starts[row])
        end = min(begin + plan.counts[row], table.num_prompt(slot) - 1)
        start = max(begin, params.prompt_logprobs_from - 1)
        if start < end:
            try:
                offset = int(inputs.batch.q_start[row]) + start - begin
                wanted[row] = _following(model, table.known(slot), start, end, offset, hidden, params)
            except Exception as error:
                errors[row] = failure(error)
    return wanted, errors


def pooled_of(model: CausalModel, table: RowTable, inputs: StepInputs, hidden: Tensor) -> dict[int, Float64]:
    """What the step adds to embeddings, by row that asks for one."""
    found: dict[int, Float64] = {}
    plan = inputs.plan
    for row, slot in enumerate(plan.slots):
        if not (pooling := table.params(slot).pooling):
            continue
        begin, length = int(inputs.starts[row]), table.num_prompt(slot)
        end = min(begin + plan.counts[row], length)
        start = begin if pooling == "mean" else max(begin, length - 1)
        if start < end:
            offset = int(inputs.batch.q_start[row]) + start - begin
            states = model.final_norm(hidden[offset : offset + end - start])
            found[row] = states.double().sum(0).numpy(force=True)
    return found


def _following(
    model: CausalModel, tokens: Int32, start: int, end: int, offset: int, hidden: Tensor, params: SamplingParams
) -> list[TokenLogprobs]:
    """Log-probabilities of tokens start+1 … end, which the hidden rows from ``offset`` on predict."""
    entries = []
    count, asked = params.prompt_logprobs or 0, params.logprob_token_ids
    for begin in range(start, end, PROMPT_LOGPROB_ROWS):
        stop = min(begin + PROMPT_LOGPROB_ROWS, end)
        rows: Int32 = np.arange(offset + begin - start, offset + stop - start, dtype=np.int32)
        following = sent(tokens[begin + 1 : stop + 1], hidden.device)
        told, read = report(model.logits(hidden, rows), following, [(count, asked)] * len(rows))
        for entry in read(told.numpy(force=True)):
            if entry is None:
                raise ValueError(NOT_FINITE)
            entries.append(entry)
    return entries
