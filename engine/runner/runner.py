"""Executes step plans: keeps each running request's tokens and blocks, runs the model, draws tokens.

The runner owns what a step needs besides the plan, in tables with one row per running request, so that a plan can
name a token that the step before it has yet to draw.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.runner.sampler import Sampled, SamplingRow, sample, token_logprobs
from slipstream.kernels.batch import Int32, RaggedBatch, make_batch

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are held at once; a row is the size of the vocabulary."""


@dataclass(slots=True)
class _Row:
    params: SamplingParams
    seed: int
    num_prompt: int
    num_tokens: int
    """Known tokens, drawn ones included."""


class ModelRunner:
    def __init__(
        self, model: CausalModel, num_blocks: int, block_size: int, max_running: int, max_model_len: int
    ) -> None:
        self.model = model
        self.cache = model.new_cache(num_blocks, block_size)
        self._block_size = block_size
        self._tokens = np.zeros((max_running, max_model_len + 1), np.int32)
        self._blocks = np.zeros((max_running, -(-max_model_len // block_size) + 1), np.int32)
        self._rows: list[_Row | None] = [None] * max_running

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step; plans must come in the order they were made."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._enter(plan)
        batch = self._batch(plan)
        drawing = [row for row, wanted in enumerate(plan.samples) if wanted]
        rows = [self._sampling_row(plan.slots[row]) for row in drawing]
        last: Int32 = batch.q_start[1:][drawing] - 1

        model_began, model_cpu_began = time.perf_counter(), time.thread_time()
        hidden = self.model.forward(batch, self.cache)
        drawn = sample(self.model.logits(hidden, last), rows) if rows else Sampled([])
        prompt_logprobs = self._prompt_logprobs(plan, batch, hidden)
        model_cpu, model_seconds = time.thread_time() - model_cpu_began, time.perf_counter() - model_began

        tokens = [-1] * len(plan.slots)
        for row, token in zip(drawing, drawn.tokens, strict=True):
            tokens[row] = token
            self._append(plan.slots[row], token)
        return StepResult(
            tokens=tokens,
            logprobs={drawing[at]: entry for at, entry in drawn.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
            errors={drawing[at]: message for at, message in drawn.errors.items()},
            seconds=time.perf_counter() - began,
            model_seconds=model_seconds,
            overhead_cpu_seconds=time.thread_time() - cpu_began - model_cpu,
        )

    @torch.inference_mode()
    def profile(self, tokens: int, context: int) -> float:
        """Seconds of a forward pass over one segment that ends at ``context``, one row of logits included.

        Writes to block 0 only and must run before requests do.
        """
        table = np.zeros((1, -(-context // self._block_size)), np.int32)
        batch = make_batch(
            np.zeros(tokens, np.int32),
            np.array([tokens], np.int32),
            np.array([context], np.int32),
            table,
            np.zeros(1, np.int32),
            self._block_size,
        )
        began = time.perf_counter()
        hidden = self.model.forward(batch, self.cache)
        self.model.logits(hidden, np.zeros(1, np.int32)).argmax(-1).tolist()
        return time.perf_counter() - began

    def _enter(self, plan: StepPlan) -> None:
        """Brings the tables to the state the plan was made for."""
        for new in plan.new:
            self._tokens[new.slot, : len(new.tokens)] = new.tokens
            self._rows[new.slot] = _Row(new.params, new.seed, new.num_prompt, len(new.tokens))
        for slot, first, blocks in plan.blocks:
            self._blocks[slot, first : first + len(blocks)] = blocks
        if plan.copies:
            self.cache.copy_blocks(plan.copies)

    def _append(self, slot: int, token: int) -> None:
        row = self._row(slot)
        self._tokens[slot, row.num_tokens] = token
        row.num_tokens += 1

    def _row(self, slot: int) -> _Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def _sampling_row(self, slot: int) -> SamplingRow:
        row = self._row(slot)
        return SamplingRow(row.params, row.seed, row.num_prompt, self._tokens[slot, : row.num_tokens])

    def _batch(self, plan: StepPlan) -> RaggedBatch:
        slots = np.array(plan.slots, np.int32)
        starts = np.array(plan.starts, np.int32)
        counts = np.array(plan.counts, np.int32)
        if len(slots) == plan.num_tokens:
            token_ids = self._tokens[slots, starts]
        else:
            token_ids = np.concatenate(
                [
                    self._tokens[slot, start : start + count]
                    for slot, start, count in zip(slots, starts, counts, strict=True)
                ]
            )
        return make_batch(token_ids, counts, starts + counts, self._blocks, slots, self._block_size)

    def _prompt_logprobs(self, plan: StepPlan, batch: RaggedBatch, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """Of the prompt tokens that follow the positions of this step, for rows that ask for them."""
        wanted: dict[int, list[TokenLogprobs]] = {}
        for row, slot in enumerate(plan.slots):
            entry = self._row(slot)
            count = entry.params.prompt_logprobs
            if count is None:
                continue
            start = plan.starts[row]
            end = min(start + plan.counts[row], entry.num_prompt - 1)
            if start < end:
                wanted[row] = self._following(slot, start, end, int(batch.q_start[row]), hidden, count)
        return wanted

    def _following(
        self, slot: int, start: int, end: int, offset: int, hidden: Tensor, count: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of tokens start+1 … end, which the hidden rows from ``offset`` on predict."""
        entries = []
        for begin in range(start, end, PROMPT_LOGPROB_ROWS):
            stop = min(begin + PROMPT_LOGPROB_ROWS, end)
            rows: Int32 = np.arange(offset + begin - start, offset + stop - start, dtype=np.int32)
            logprobs = self.model.logits(hidden, rows).log_softmax(-1)
            for position, row_logprobs in zip(range(begin, stop), logprobs, strict=True):
                entries.append(token_logprobs(row_logprobs, int(self._tokens[slot, position + 1]), count))
        return entries
