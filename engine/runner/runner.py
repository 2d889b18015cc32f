"""Executes step plans: prepares a step's inputs, runs the model over them, samples tokens, and accepts draft tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.grammars.endings import Mask
from slipstream.engine.grammars.grammar import Grammars
from slipstream.engine.listening import Listeners
from slipstream.engine.messages import TokenLogprobs
from slipstream.engine.models.protocol import CausalModel, Forward
from slipstream.engine.plan import FirstDraft, Float64, StepPlan, StepResult
from slipstream.engine.runner.following import Following, begin, follow, slots_of
from slipstream.engine.runner.inputs import Accepted, StepInputs, prepare
from slipstream.engine.runner.prompts import pooled_of, prompt_logprobs_of
from slipstream.engine.runner.row_drafts import RowDrafts
from slipstream.engine.runner.rows import RowTable
from slipstream.engine.runner.sampler import (
    Sampled,
    Sampling,
    SamplingBatch,
    most_likely,
    sample,
    sample_apart,
)
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.runner.standing import Standing
from slipstream.engine.speculation.protocol import Computed, DraftHost, take
from slipstream.engine.speculation.scratch import Scratch
from slipstream.kernels.batch import make_batch
from slipstream.kernels.kv_cache import PagedKVCache


@dataclass(slots=True)
class Launched:
    """A step that the device computes, or has computed."""

    plan: StepPlan
    inputs: StepInputs
    rows: list[RowDrafts]
    """Who had each row of the plan when it was launched."""
    computed: Forward
    sampling: Sampling | None
    """None where no token is sampled."""
    following: Following
    top: tuple[Tensor, Tensor] | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    errors: dict[int, str]
    pooled: dict[int, Float64]
    began: float
    model_began: float
    cpu_seconds: float
    """CPU time of this thread besides the model and sampling."""

    @property
    def may_wait(self) -> bool:
        """Whether the next step may be launched before this one is collected."""
        is_plain = self.inputs.expecting is not None and not any(self.plan.wanted)
        return is_plain or bool(self.following.made)


class ModelRunner:
    def __init__(
        self,
        model: CausalModel,
        num_blocks: int,
        block_size: int,
        max_running: int,
        max_model_len: int,
        speculator: Speculator,
        listeners: Listeners,
        scratch_blocks: int = 0,
        grammars: Grammars | None = None,
    ) -> None:
        """The cache gets ``scratch_blocks`` besides those that plans name, for branches of trees."""
        self.model = model
        self.speculator = speculator
        self.cache = model.new_cache(num_blocks + scratch_blocks, block_size)
        self._num_blocks = num_blocks
        self._block_size = block_size
        # One position more than a sequence has, for a token that is sampled and not kept, and the drafts after it.
        longest, blocks = max_model_len + 1 + speculator.most, -(-max_model_len // block_size) + 1
        self._table = RowTable(max_running, longest, blocks, scratch_blocks)
        self._scratch = Scratch(self._table.blocks, num_blocks, scratch_blocks, block_size)
        device = self.cache.device
        self._standing = Standing(max_running, speculator.most, device)
        host = model, self._table.blocks, num_blocks + scratch_blocks, block_size, self._scratch
        speculator.attach(DraftHost(*host, self._standing.latest, self._standing.missed))
        self._grammars = grammars or Grammars()
        self._listeners = listeners
        self._taps = listeners.taps(model, speculator.taps)
        self.runs_ahead = model.takes_latest and device.type != "cpu"
        """Whether steps may be launched before the last one is collected, which pays where a device computes."""
        self._open: deque[Launched] = deque()
        """Steps that are launched and not collected, of which the second follows the first."""
        self._ready = 0.0
        """When the last step was over."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step; plans must come in the order they were made."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Gives a step to the device; plans must come in the order they were made, and be collected in it."""
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._enter(plan)
        before = self._open[-1].following if self._open else Following()
        inputs = self._prepare(plan, before)
        begun = begin(inputs, self._table, self.speculator, before.made) if self.speculator.begins else []
        batch = inputs.batch
        if begun:
            columns = (column for each in begun for column in (*each.arrays, slots_of(each)))
            batch = replace(batch, columns=(*batch.columns, *columns))

        model_began, model_cpu_began = time.perf_counter(), time.thread_time()
        computed = self.model.forward(batch, self.cache, self._taps)
        sampling, top = self._sample(inputs, computed)
        can_go_on = inputs.is_free and inputs.batch.missed is not None and self._can_go_on(plan)
        following = follow(begun, inputs, computed, sampling, self.speculator, self._standing, can_go_on)
        prompt_logprobs, errors = prompt_logprobs_of(self.model, self._table, inputs, computed.hidden)
        pooled = pooled_of(self.model, self._table, inputs, computed.hidden)
        if inputs.expecting is not None and sampling is not None:
            slots = computed.columns[1].long()
            self._standing.rows[:, 1].index_copy_(0, slots, sampling.tokens.clamp(min=0).int())
            self._table.expect(inputs.expecting, 1, self._standing.sampled(inputs.expecting))
        elif following.made:
            expecting, verified = np.array(plan.slots, np.int32), np.array(inputs.drafted, np.int32)
            self._table.expect(expecting, verified + 1, self._standing.sampled(expecting))
        cpu_seconds = time.thread_time() - cpu_began - (time.thread_time() - model_cpu_began)
        rows = [self._table.drafts(slot) for slot in plan.slots]
        launched = Launched(
            plan=plan,
            inputs=inputs,
            rows=rows,
            computed=computed,
            sampling=sampling,
            following=following,
            top=top,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
            pooled=pooled,
            began=began,
            model_began=model_began,
            cpu_seconds=cpu_seconds,
        )
        self._open.append(launched)
        return launched

    @property
    def _there(self) -> tuple[Tensor | None, Tensor | None]:
        """What batches may refer to: ``latest`` and ``missed`` of ``RaggedBatch``."""
        latest = self._standing.latest if self.runs_ahead else None
        may_miss = self.runs_ahead and self.speculator.begins and self.cache.is_recordable
        return latest, self._standing.missed if may_miss else None

    def _can_go_on(self, plan: StepPlan) -> bool:
        """Whether what follows the step is all that can be proposed after it, and nothing but the noise of its rows
        depends on how many tokens they have."""
        drafts = [self._table.drafts(slot).draft for slot in plan.slots]
        names = self.speculator.beginning
        return all(each.drafters <= names and each.params.min_tokens <= each.index for each in drafts)

    def fits_behind(self, plan: StepPlan, before: Launched) -> bool:
        """Whether a step may be launched before that one is collected: what it needs of it lies on the device."""
        if before.following.made:  # whatever else changes is seen once that is read
            return not (plan.new or plan.ended or plan.copies or self._table.sampling.faults)
        return before.may_wait and not any(plan.drafts) and not (self.speculator.begins and any(plan.costly))

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """What a step brought, once the device has computed it."""
        self._open.popleft()
        plan, inputs, computed, top = launched.plan, launched.inputs, launched.computed, launched.top
        errors = launched.errors
        sampled, told = (Sampled([]), []) if launched.sampling is None else launched.sampling.wait()
        ready, cpu_began = time.perf_counter(), time.thread_time()
        # Short where nobody read the last step early.
        computing = ready - max(launched.model_began, self._ready)
        drafting = min(launched.following.tell(told), computing)
        model_seconds = computing - drafting
        began, self._ready = max(launched.began, self._ready), ready

        tokens: list[list[int]] = [[] for _ in plan.slots]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        first_drafts: dict[int, FirstDraft] = {}
        behind: dict[int, int] = {}
        accepted, drafted = inputs.accept(sampled.tokens), inputs.drafted
        refused: set[int] = set()
        for each in accepted:
            row = each.row
            slot, drafts = plan.slots[row], launched.rows[row]
            if sampled.errors and (wrong := [sampled.errors[at] for at in each.samples if at in sampled.errors]):
                errors.setdefault(row, wrong[0])
                refused |= {row} if sampled.refused.intersection(each.samples) else set()
            if row in errors:
                continue
            tokens[row] = [sampled.tokens[at] for at in each.samples]
            at = int(inputs.starts[row]) + plan.counts[row]
            if inputs.expecting is None and not launched.following.made:
                self._table.append(slot, tokens[row])
            elif self._table.drafts(slot) is drafts:  # else another request has the row by now
                missed = drafted[row] + 1 - len(tokens[row])
                self._table.arrive(slot, at, tokens[row], missed, self._standing.sampled(slot))
                behind |= {slot: missed}
            if (first_draft := self.speculator.verified(drafts, drafted[row], tokens[row])) is not None:
                first_drafts[row] = first_draft
            if each.samples[0] in sampled.logprobs:
                logprobs[row] = [sampled.logprobs[at] for at in each.samples]
        if launched.following.made and self._open:
            launched.following.settle(self._open[0].inputs, behind)
        if inputs.trees:
            self._leave_branches(inputs, accepted)
        if computed.features is not None:
            observed = self._observed(launched, accepted, computed.features, top)
            self.speculator.observe(observed)
            self._listeners.observe(observed)
        seconds = time.perf_counter() - began - drafting
        offers = self._propose(launched)
        return StepResult(
            tokens=tokens,
            drafted=drafted,
            offers=offers,
            logprobs=logprobs,
            prompt_logprobs=launched.prompt_logprobs,
            pooled=launched.pooled,
            errors=errors,
            seconds=seconds,
            draft_seconds=time.perf_counter() - began - seconds,
            drafters=self.speculator.stats,
            model_seconds=model_seconds,
            overhead_cpu_seconds=launched.cpu_seconds + time.thread_time() - cpu_began,
            refused=frozenset(refused),
            shortened=self._table.shortened(plan.slots),
            first_drafts=first_drafts,
        )

    @torch.inference_mode()
    def profile(self, segments: int, tokens: int, context: int, prompt: int = 0) -> float:
        """Seconds of a forward pass over so many segments of ``tokens`` positions that end at ``context``.

        Beside them there may be a prompt of so many. Includes one row of logits per segment. Writes to the cache, so it
        must run before requests do.
        """
        slots, blocks = len(self._table.tokens), -(-max(context, prompt) // self._block_size)
        shapes = [(tokens, context)] * segments + [(prompt, prompt)] * (prompt > 0)
        counts, lengths = np.ascontiguousarray(np.array(shapes, np.int32).T)
        rows = np.arange(len(shapes), dtype=np.int32) % slots
        # Through the table that requests will have: what is recorded of a step is recorded for its memory.
        table, used = self._table.blocks, rows[:slots]
        before = table[used]
        table[used, :blocks] = np.arange(len(used) * blocks).reshape(-1, blocks) % self._num_blocks
        batch = make_batch(np.zeros(counts.sum(), np.int32), counts, lengths, table, rows, self._block_size)
        latest, missed = self._there
        nobody = None if missed is None else np.full(batch.num_segments, len(missed) - 1, np.int32)
        batch = replace(batch, latest=latest, missed=missed, whose=nobody)
        is_host = self.cache.device.type == "cpu" and not self.runs_ahead
        for _ in range(1 if is_host else 2):  # the first one on a GPU compiles or loads kernels, and is recorded
            began = time.perf_counter()
            hidden = self.model.forward(batch, self.cache, self._taps).hidden
            self.model.logits(hidden, batch.q_start[1:] - 1).argmax(-1).tolist()
        table[used] = before
        return time.perf_counter() - began

    @property
    def caches(self) -> list[PagedKVCache]:
        """The model's keys and values, and those of drafters."""
        return [self.cache, *(cache for drafter in self.speculator.drafters for cache in drafter.caches)]

    def reset(self) -> None:
        """Forgets all rows: a step failed, and nobody knows what it left. Raises where the device is lost too."""
        self._table.clear()
        self._open.clear()
        if self.cache.device.type == "cuda":
            torch.cuda.synchronize()

    def _enter(self, plan: StepPlan) -> None:
        """Brings the table to the state the plan was made for."""
        table = self._table
        for slot, length in plan.ended:
            self.speculator.finish(table.drafts(slot), length)
            table.constraints.pop(slot, None)
        for new in plan.new:
            tokens = table.tokens[new.slot]
            tokens[: len(new.tokens)] = new.tokens
            drafts = self.speculator.enter(new, tokens)
            said, scope = new.tokens[len(new.request.prompt) :], new.request.scope
            drafts.constraint = self._grammars.constrain(new.request.params, said, scope)
            table.enter(new, drafts)
        for slot, first, blocks in plan.blocks:
            table.map(slot, first, blocks, self._block_size)
        if plan.copies:
            self.cache.copy_blocks(plan.copies)

    def _prepare(self, plan: StepPlan, before: Following) -> StepInputs:
        trees = {}
        for row, (slot, most) in enumerate(zip(plan.slots, plan.drafts, strict=True)):
            if most and slot in before.made:
                trees[row] = before.tree(slot, most, self._standing)
            elif most and (tree := self.speculator.draft_tree(self._table.drafts(slot), most)):
                trees[row] = tree
        latest, missed = self._there
        inputs = prepare(plan, trees, self._table, self._scratch, latest, missed, before.made)
        if inputs.copies:
            self.cache.copy_blocks(inputs.copies)
        return inputs

    def _sample(self, inputs: StepInputs, computed: Forward) -> tuple[Sampling | None, tuple[Tensor, Tensor] | None]:
        """What is sampled, and the most likely tokens at these places if somebody wants to see them."""
        if not len(inputs.logits_rows):
            return None, None
        rows, *columns = computed.columns[: len(inputs.batch.columns)]
        if inputs.expecting is not None:
            columns = columns[1:]
        if inputs.is_moved:  # the seventh is the index of the token
            shift, *columns = columns
            columns[6] = columns[6] - self._standing.missed.index_select(0, shift)
        logits, top = self.model.logits(computed.hidden, rows), None
        sampling = (self._table.drafts(inputs.plan.slots[row]).draft for row, _ in inputs.first_samples)
        if count := self._listeners.top_k(sampling):
            top = most_likely(logits, count)
        batch = self._constrained(inputs)
        try:
            return sample(logits, batch, columns), top
        except Exception:
            # One row that cannot be sampled costs the others nothing but the time for a second try. Sampling overwrites
            # logits. All rows at once, so that they have the same bits as before.
            logits = self.model.logits(computed.hidden, rows)
            return Sampling.known(sample_apart(logits, batch), logits.device), top

    def _constrained(self, inputs: StepInputs) -> SamplingBatch:
        """What the step samples with, and what grammars allow at each place.

        The device computes the step meanwhile, where it does that by itself.
        """
        constraints = self._table.constraints
        if not constraints:
            return inputs.sampling
        masks: dict[int, Mask] = {}
        faults = dict(inputs.sampling.faults)
        for row, first in inputs.first_samples:
            if (constraint := constraints.get(inputs.plan.slots[row])) is None:
                continue
            placed = inputs.trees.get(row)
            try:
                found = constraint.masks(placed.tree if placed is not None else None)
            except Exception as error:  # whatever a grammar does wrong is its own request's fault
                faults[first] = error
            else:
                masks |= {at: mask for at, mask in enumerate(found, first) if mask is not None}
        return replace(inputs.sampling, masks=masks, faults=faults)

    def _leave_branches(self, inputs: StepInputs, accepted: Sequence[Accepted]) -> None:
        """Copies keys and values of accepted draft tokens on branches to their rows' own blocks."""
        nodes = [(inputs.trees[each.row], node) for each in accepted for node in each.nodes]
        moved = [(tree, node) for tree, node in nodes if tree.table_rows[node] != tree.slot]
        if moved:
            positions = [tree.positions[node] for tree, node in moved]
            source = self._scratch.cells([tree.table_rows[node] for tree, node in moved], positions)
            destination = self._scratch.cells([tree.slot for tree, _ in moved], positions)
            self.cache.copy_cells(list(zip(source.tolist(), destination.tolist(), strict=True)))

    def _observed(
        self,
        launched: Launched,
        accepted: Sequence[Accepted],
        features: Tensor,
        top: tuple[Tensor, Tensor] | None,
    ) -> list[Computed]:
        """What the step computed of each row, without what follows a rejected draft token."""
        inputs, starts = launched.inputs, launched.inputs.starts.tolist()
        by_row = {each.row: each for each in accepted}
        found: list[Computed] = []
        for row, (drafts, rows) in enumerate(zip(launched.rows, inputs.known_rows(), strict=True)):
            each, row_top = by_row.get(row), None
            if each is not None and each.nodes:
                rows = [*rows, *(inputs.trees[row].batch_rows[node] for node in each.nodes)]
            if each is not None and top is not None:
                row_top = take(top[0], each.samples), take(top[1], each.samples)
            found.append(Computed(drafts.draft, starts[row], features, rows, row_top))
        return found

    def _propose(self, launched: Launched) -> list[tuple[float, ...]]:
        plan = launched.plan
        offers: list[tuple[float, ...]] = [()] * len(plan.slots)
        asked = [row for row, most in enumerate(plan.wanted) if most and row not in launched.errors]
        if asked:
            rows = [launched.rows[row] for row in asked]
            wanted, costly = ([most[row] for row in asked] for most in (plan.wanted, plan.costly))
            proposed = self.speculator.propose(rows, wanted, costly)
            for row, offer in zip(asked, proposed, strict=True):
                offers[row] = offer
        return offers
