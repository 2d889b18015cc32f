"""Executes step plans: keeps each running request's tokens and blocks, runs the model, draws tokens.

The runner owns what a step needs besides the plan, in tables with one row per running request, so that a plan can
name a token that the step before it has yet to draw.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.messages import SamplingParams, TokenLogprobs
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.runner.sampler import (
    Sampled,
    SamplingRow,
    failure,
    most_likely,
    sample,
    sample_apart,
    token_logprobs,
)
from slipstream.engine.runner.trees import BranchSegments, PlacedTree
from slipstream.engine.speculation.protocol import DraftHost
from slipstream.engine.speculation.scratch import Scratch
from slipstream.engine.speculation.speculator import Speculator
from slipstream.engine.speculation.tree import branches
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
        self,
        model: CausalModel,
        num_blocks: int,
        block_size: int,
        max_running: int,
        max_model_len: int,
        speculator: Speculator,
        scratch_blocks: int = 0,
    ) -> None:
        """The cache gets ``scratch_blocks`` besides those that plans name, for branches of trees."""
        self.model = model
        self.speculator = speculator
        self.cache = model.new_cache(num_blocks + scratch_blocks, block_size)
        self._num_blocks = num_blocks
        self._block_size = block_size
        # One position more than a sequence has, for a token that is drawn and not kept, and the guesses after it.
        self._tokens = np.zeros((max_running, max_model_len + 1 + speculator.most), np.int32)
        self._blocks = np.zeros((max_running + scratch_blocks, -(-max_model_len // block_size) + 1), np.int32)
        self._scratch = Scratch(self._blocks, num_blocks, scratch_blocks, block_size)
        self._mapped = [0] * max_running
        self._rows: list[_Row | None] = [None] * max_running
        speculator.attach(DraftHost(model, self._blocks, num_blocks + scratch_blocks, block_size, self._scratch))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step; plans must come in the order they were made."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._enter(plan)
        batch, trees = self._batch(plan)
        drawing = [row for row, wanted in enumerate(plan.samples) if wanted]
        rows, last = self._positions_to_draw(plan, batch, drawing, trees)

        model_began, model_cpu_began = time.perf_counter(), time.thread_time()
        computed = self.model.forward(batch, self.cache, self.speculator.taps)
        hidden = computed.hidden
        drawn, top = Sampled([]), None
        if rows:
            logits = self.model.logits(hidden, last)
            if count := self.speculator.top_k(plan.slots[row] for row in drawing):
                top = most_likely(logits, count)
            drawn = self._draw(logits, rows, hidden, last)
        prompt_logprobs, errors = self._prompt_logprobs(plan, batch, hidden)
        model_cpu, model_seconds = time.thread_time() - model_cpu_began, time.perf_counter() - model_began

        tokens: list[list[int]] = [[] for _ in plan.slots]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        paths: dict[int, list[int]] = {}
        proposals: dict[int, tuple[int, bool]] = {}
        at = 0
        for row in drawing:
            drafted = plan.drafts[row]
            path = paths[row] = trees[row].tree.right(drawn.tokens[at : at + drafted + 1]) if drafted else []
            places = [at, *(at + 1 + node for node in path)]
            at += drafted + 1
            if wrong := [drawn.errors[place] for place in places if place in drawn.errors]:
                errors.setdefault(row, wrong[0])
            if row in errors:
                continue
            tokens[row] = [drawn.tokens[place] for place in places]
            if proposal := self._accept(plan.slots[row], drafted, tokens[row]):
                proposals[row] = proposal
            if places[0] in drawn.logprobs:
                logprobs[row] = [drawn.logprobs[place] for place in places]
        self._leave_branches(trees, paths)
        if computed.features is not None:
            self.speculator.observe(self._computed(plan, batch, computed.features, trees, paths, top))
        seconds = time.perf_counter() - began
        offers = self._propose(plan, errors)
        return StepResult(
            tokens=tokens,
            offers=offers,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            seconds=seconds,
            draft_seconds=time.perf_counter() - began - seconds,
            drafters=self.speculator.stats,
            model_seconds=model_seconds,
            overhead_cpu_seconds=time.thread_time() - cpu_began - model_cpu,
            proposals=proposals,
        )

    @torch.inference_mode()
    def profile(self, segments: int, tokens: int, context: int) -> float:
        """Seconds of a forward pass over so many segments of ``tokens`` positions that end at ``context``.

        Includes one row of logits per segment. Writes to the cache, so it must run before requests do.
        """
        blocks = -(-context // self._block_size)
        table = np.arange(segments * blocks, dtype=np.int32).reshape(segments, blocks) % self._num_blocks
        counts = np.full(segments, tokens, np.int32)
        rows = np.arange(segments, dtype=np.int32)
        batch = make_batch(
            np.zeros(segments * tokens, np.int32),
            counts,
            np.full(segments, context, np.int32),
            table,
            rows,
            self._block_size,
        )
        began = time.perf_counter()
        hidden = self.model.forward(batch, self.cache).hidden
        self.model.logits(hidden, batch.q_start[1:] - 1).argmax(-1).tolist()
        return time.perf_counter() - began

    def reset(self) -> None:
        """Forgets all rows: a step failed, and nobody knows what it left. Raises where the device is lost too."""
        self._rows = [None] * len(self._rows)
        self.speculator.reset()
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize()

    def _enter(self, plan: StepPlan) -> None:
        """Brings the tables to the state the plan was made for."""
        for slot in plan.ended:
            self.speculator.finish(slot)
        for new in plan.new:
            self._tokens[new.slot, : len(new.tokens)] = new.tokens
            self._rows[new.slot] = _Row(new.params, new.seed, new.num_prompt, len(new.tokens))
            self.speculator.enter(new, self._tokens[new.slot])
        for slot, first, blocks in plan.blocks:
            self._blocks[slot, first : first + len(blocks)] = blocks
            self._mapped[slot] = (first + len(blocks)) * self._block_size
        if plan.copies:
            self.cache.copy_blocks(plan.copies)

    def _positions_to_draw(
        self, plan: StepPlan, batch: RaggedBatch, drawing: list[int], trees: dict[int, PlacedTree]
    ) -> tuple[list[SamplingRow], Int32]:
        """After the last known token of each row and after each guess: what to draw with, and the row of hidden.

        Every position is drawn as if the guesses before it on its path were right; what follows a wrong one is thrown
        away.
        """
        rows: list[SamplingRow] = []
        last: list[int] = []
        for row in drawing:
            entry, tokens = self._row(plan.slots[row]), self._tokens[plan.slots[row]]
            last.append(int(batch.q_start[row]) + plan.counts[row] - plan.drafts[row] - 1)
            histories = [tokens[: entry.num_tokens]]
            if row in trees:
                last += trees[row].batch_rows
                histories += trees[row].histories(tokens)
            rows += [SamplingRow(entry.params, entry.seed, entry.num_prompt, history) for history in histories]
        return rows, np.array(last, np.int32)

    def _accept(self, slot: int, drafted: int, tokens: list[int]) -> tuple[int, bool] | None:
        """These tokens came: the guesses that are right, and one more; returns what Speculator.verified does."""
        entry = self._row(slot)
        self._tokens[slot, entry.num_tokens : entry.num_tokens + len(tokens)] = tokens
        entry.num_tokens += len(tokens)
        return self.speculator.verified(slot, drafted, tokens, entry.num_tokens)

    def _leave_branches(self, trees: dict[int, PlacedTree], paths: dict[int, list[int]]) -> None:
        """Copies keys and values of right guesses on branches to their rows' own blocks."""
        nodes = [(trees[row], node) for row, path in paths.items() for node in path]
        moved = [(tree, node) for tree, node in nodes if tree.table_rows[node] != tree.slot]
        if moved:
            positions = [tree.positions[node] for tree, node in moved]
            source = self._scratch.slots([tree.table_rows[node] for tree, node in moved], positions)
            destination = self._scratch.slots([tree.slot for tree, _ in moved], positions)
            self.cache.copy_cells(list(zip(source.tolist(), destination.tolist(), strict=True)))

    def _computed(
        self,
        plan: StepPlan,
        batch: RaggedBatch,
        features: Tensor,
        trees: dict[int, PlacedTree],
        paths: dict[int, list[int]],
        top: tuple[Tensor, Tensor] | None,
    ) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, Tensor] | None]]:
        """(slot, first position, features, most likely tokens) of each row, without what follows a wrong guess."""
        at = 0
        for row, slot in enumerate(plan.slots):
            begin = int(batch.q_start[row])
            known = begin + plan.counts[row] - plan.drafts[row]
            right = [trees[row].batch_rows[node] for node in paths.get(row, ())]
            computed = _take(features, [*range(begin, known), *right])
            row_top = None
            if plan.samples[row]:
                if top:
                    kept = [at, *(at + 1 + node for node in paths[row])]
                    row_top = _take(top[0], kept), _take(top[1], kept)
                at += plan.drafts[row] + 1
            yield slot, plan.starts[row], computed, row_top

    def _propose(self, plan: StepPlan, errors: Container[int]) -> list[tuple[float, ...]]:
        offers: list[tuple[float, ...]] = [()] * len(plan.slots)
        asked = [row for row, most in enumerate(plan.wanted) if most and row not in errors]
        if asked:
            slots = [plan.slots[row] for row in asked]
            wanted, mapped = [plan.wanted[row] for row in asked], [self._mapped[slot] for slot in slots]
            proposed = self.speculator.propose(slots, wanted, mapped, plan.costly_guesses)
            for row, offer in zip(asked, proposed, strict=True):
                offers[row] = offer
        return offers

    def _row(self, slot: int) -> _Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def _batch(self, plan: StepPlan) -> tuple[RaggedBatch, dict[int, PlacedTree]]:
        """What to compute, and by row where the guesses are in it."""
        trees = {row: self.speculator.guesses(plan.slots[row], n) for row, n in enumerate(plan.drafts) if n}
        paths = {row: branches(tree.parents) for row, tree in trees.items()}
        counts = np.array(plan.counts, np.int32)
        for row, tree in trees.items():
            slot, first = plan.slots[row], paths[row][0]
            known = self._row(slot).num_tokens
            self._tokens[slot, known : known + len(first)] = [tree.tokens[node] for node in first]
            counts[row] -= len(tree.parents) - len(first)
        slots = np.array(plan.slots, np.int32)
        starts = np.array(plan.starts, np.int32)
        if len(slots) == plan.num_tokens:
            token_ids = self._tokens[slots, starts]
        else:
            token_ids = np.concatenate(
                [
                    self._tokens[slot, start : start + count]
                    for slot, start, count in zip(slots, starts, counts, strict=True)
                ]
            )
        self._scratch.reset()
        added = BranchSegments(self._scratch, len(token_ids))
        roots = (np.cumsum(counts) - counts + np.array(plan.counts) - np.array(plan.drafts) - 1).tolist()
        placed = {
            row: added.place(
                trees[row],
                paths[row],
                plan.slots[row],
                plan.starts[row],
                self._row(plan.slots[row]).num_tokens,
                roots[row],
            )
            for row in trees
        }
        lengths: Int32 = np.array([self._row(slot).num_tokens for slot in plan.slots], np.int32)
        if not added.counts:
            batch = make_batch(token_ids, counts, starts + counts, self._blocks, slots, self._block_size, known=lengths)
            return batch, placed
        if added.copies:
            self.cache.copy_blocks(added.copies)
        batch = make_batch(
            np.append(token_ids, np.array(added.token_ids, np.int32)),
            np.append(counts, np.array(added.counts, np.int32)),
            np.append(starts + counts, np.array(added.ends, np.int32)),
            self._blocks,
            np.append(slots, np.array(added.table_rows, np.int32)),
            self._block_size,
            np.array(added.mirrors, np.int32).reshape(-1, 3),
            np.append(lengths, np.array(added.ends, np.int32)),
        )
        return batch, placed

    def _draw(self, logits: Tensor, rows: list[SamplingRow], hidden: Tensor, last: Int32) -> Sampled:
        """One row that cannot be drawn costs the others nothing but the time for a second try."""
        try:
            return sample(logits, rows)
        except Exception:
            # Drawing overwrites logits. All rows at once, so that they have the same bits as before.
            return sample_apart(self.model.logits(hidden, last), rows)

    def _prompt_logprobs(
        self, plan: StepPlan, batch: RaggedBatch, hidden: Tensor
    ) -> tuple[dict[int, list[TokenLogprobs]], dict[int, str]]:
        """Of the prompt tokens that follow the positions of this step, for rows that ask for them; errors by row."""
        wanted: dict[int, list[TokenLogprobs]] = {}
        errors: dict[int, str] = {}
        for row, slot in enumerate(plan.slots):
            entry = self._row(slot)
            count = entry.params.prompt_logprobs
            if count is None:
                continue
            start = plan.starts[row]
            end = min(start + plan.counts[row], entry.num_prompt - 1)
            if start < end:
                try:
                    wanted[row] = self._following(slot, start, end, int(batch.q_start[row]), hidden, count)
                except Exception as error:
                    errors[row] = failure(error)
        return wanted, errors

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


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they follow each other."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor[rows]
