"""The inputs of one step, made of its plan and the table of rows, and what was accepted of what the step sampled."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slipstream.engine.plan import StepPlan
from slipstream.engine.runner.changes import History
from slipstream.engine.runner.rows import RowTable
from slipstream.engine.runner.sampler import SamplingBatch
from slipstream.engine.runner.trees import BranchSegments, PlacedTree
from slipstream.engine.speculation.scratch import Scratch
from slipstream.engine.speculation.tree import Tree, branches
from slipstream.kernels.batch import NO_MIRRORS, Int32, RaggedBatch, make_batch


@dataclass(slots=True)
class Accepted:
    """The accepted draft tokens of a row, which were sampled at their places, and the token sampled after them."""

    row: int
    """Row of the plan."""
    nodes: list[int]
    """The draft tokens, as nodes of the row's tree, from the root on."""
    samples: list[int]
    """Where the row's tokens are among the step's samples, one more than nodes."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step as it is computed: where its plan names places, these are the tokens and positions.

    Draft tokens are inputs like others. So whoever runs the same step in several places (tensor parallelism) decides in
    one of them which ones there are (``trees``) and hands them on with the plan.
    """

    plan: StepPlan
    starts: Int32
    """[rows] first position computed of each row of the plan."""
    batch: RaggedBatch
    trees: dict[int, PlacedTree]
    """By row of the plan: the draft tokens that are verified."""
    copies: list[tuple[int, int]]
    """Cache blocks, (source, destination), to copy before the forward pass."""
    logits_rows: Int32
    """[samples] batch row after which each token is sampled: of every row that samples, the last known token and then
    each node of its tree, as if the draft tokens before it were right."""
    first_samples: list[tuple[int, int]]
    """Rows of the plan that sample, with the place of the first of their samples."""
    sampling: SamplingBatch
    """What the tokens are sampled with."""
    expecting: Int32 | None = None
    """[samples] the slots that get a token each, if the next step may be launched before these are known."""
    is_free: bool = False
    """Whether no row looks at tokens on the host."""
    is_moved: bool = False
    """Whether there is a column of whose samples the drawn ones are, as in ``RaggedBatch.whose``."""

    @property
    def drafted(self) -> list[int]:
        """Draft tokens per row of the plan."""
        drafted = [0] * len(self.plan.slots)
        for row, tree in self.trees.items():
            drafted[row] = len(tree.positions)
        return drafted

    def accept(self, tokens: list[int]) -> list[Accepted]:
        """What is accepted if these tokens were sampled, one for each of ``logits_rows``."""
        accepted: list[Accepted] = []
        for row, at in self.first_samples:
            if (tree := self.trees.get(row)) is None:
                accepted.append(Accepted(row, [], [at]))
            else:
                nodes = tree.tree.accepted(tokens[at : at + 1 + len(tree.positions)])
                accepted.append(Accepted(row, nodes, [at, *(at + 1 + node for node in nodes)]))
        return accepted

    def settle(self, row: int, missed: int, chain: Sequence[int]) -> None:
        """It is known now how many draft tokens of the step before this one were wrong, and which ones followed."""
        self.starts[row] -= missed
        if (placed := self.trees.get(row)) is not None:
            tree = Tree(list(chain[: len(placed.tree.tokens)]), placed.tree.parents)
            self.trees[row] = replace(placed, tree=tree, positions=[at - missed for at in placed.positions])

    def known_rows(self) -> list[Sequence[int]]:
        """Batch rows of the known tokens of each row of the plan."""
        return [range(at, at + count) for at, count in zip(self.batch.q_start.tolist(), self.plan.counts, strict=False)]


def prepare(
    plan: StepPlan,
    trees: Mapping[int, Tree],
    table: RowTable,
    scratch: Scratch,
    latest: Tensor | None = None,
    missed: Tensor | None = None,
    late: Collection[int] = (),
) -> StepInputs:
    """``trees`` are the draft tokens to verify by row of the plan; their first paths are written to the table.

    With ``latest`` and ``missed``, see ``RaggedBatch``, the batch may have tokens that only the device knows, and slots
    (``late``) of which it alone knows how long they are.
    """
    slots = np.array(plan.slots, np.int32)
    known, samples = np.array(plan.counts, np.int32), np.array(plan.samples, np.bool_)
    lengths = table.lengths[slots]
    starts = np.where(samples, lengths - known, np.array(plan.starts, np.int32))
    paths = {row: branches(tree.parents) for row, tree in trees.items()}
    counts = known.copy()
    for row, tree in trees.items():
        slot, first, length = plan.slots[row], paths[row][0], lengths[row]
        table.tokens[slot, length : length + len(first)] = [tree.tokens[node] for node in first]
        counts[row] += len(first)
    ends = starts + counts
    if len(slots) == counts.sum():
        token_ids = table.tokens[slots, starts]
    else:
        rows = zip(plan.slots, starts.tolist(), ends.tolist(), strict=True)
        token_ids = np.concatenate([table.tokens[slot, start:end] for slot, start, end in rows])
    segment_slots = table_rows = slots
    mirrors = NO_MIRRORS
    placed: dict[int, PlacedTree] = {}
    copies: list[tuple[int, int]] = []
    if trees:
        roots = (np.cumsum(counts) - counts + known - 1).tolist()
        scratch.reset()
        added = BranchSegments(scratch, len(token_ids))
        placed = {
            row: added.place(tree, paths[row], plan.slots[row], int(starts[row]), int(lengths[row]), roots[row])
            for row, tree in trees.items()
        }
        copies = added.copies
        logits_rows, first_samples, sampling, sampled_slots = _samples(plan, placed, roots, table)
        token_ids = np.append(token_ids, np.array(added.token_ids, np.int32))
        counts = np.append(counts, np.array(added.counts, np.int32))
        ends = np.append(ends, np.array(added.ends, np.int32))
        lengths = np.append(lengths, np.array(added.ends, np.int32))
        segment_slots = np.append(slots, np.array(added.slots, np.int32))
        table_rows = np.append(slots, np.array(added.table_rows, np.int32))
        if added.mirrors:
            mirrors = np.array(added.mirrors, np.int32)
    else:
        sampling_rows = samples.nonzero()[0]
        logits_rows = np.cumsum(counts, dtype=np.int32)[sampling_rows] - 1
        sampled_slots = slots[sampling_rows]
        history = partial(_known, table, sampled_slots)
        sampling = table.sampling.take(sampled_slots, lengths[sampling_rows], history)
        first_samples = list(zip(sampling_rows.tolist(), range(len(sampling_rows)), strict=True))
    is_free = latest is not None and not sampling.reads_history and table.constraints.keys().isdisjoint(plan.slots)
    expecting = sampled_slots if is_free and not trees else None
    whose = shift = None
    if missed is not None:
        whose = _whose(segment_slots, late, len(missed) - 1)
        shift = _whose(sampled_slots, late, len(missed) - 1) if len(sampling.random) else None
    batch = make_batch(
        token_ids,
        counts,
        ends,
        table.blocks,
        table_rows,
        scratch.block_size,
        mirrors,
        known=lengths,
        columns=_columns(logits_rows, sampling, expecting, shift),
        latest=latest,
        adapters=_adapters(table, segment_slots, counts),
        missed=missed,
        whose=whose,
    )
    return StepInputs(
        plan=plan,
        starts=starts,
        batch=batch,
        trees=placed,
        copies=copies,
        logits_rows=logits_rows,
        first_samples=first_samples,
        sampling=sampling,
        expecting=expecting,
        is_free=is_free,
        is_moved=shift is not None,
    )


def _known(table: RowTable, slots: Int32, i: int) -> Int32:
    return table.known(int(slots[i]))


def _whose(slots: Int32, late: Collection[int], nobody: int) -> Int32:
    """Where to look for how many draft tokens were wrong, by slot."""
    found = slots.copy()
    found[[slot not in late for slot in slots.tolist()]] = nobody
    return found


def _adapters(table: RowTable, slots: Int32, counts: Int32) -> Int32 | None:
    """The adapter of each token of segments that belong to these rows; None where no row has any."""
    numbers = table.adapters[slots]
    return np.repeat(numbers, counts) if numbers.any() else None


def _columns(
    logits_rows: Int32, sampling: SamplingBatch, expecting: Int32 | None, whose: Int32 | None
) -> tuple[NDArray[Any], ...]:
    """So that everything a step needs goes to the device at once."""
    if not len(logits_rows):
        return ()
    slots = () if expecting is None else (expecting,)
    shift = () if whose is None else (whose[sampling.random],)
    return logits_rows, *slots, *shift, *sampling.columns


def _samples(
    plan: StepPlan, trees: Mapping[int, PlacedTree], roots: list[int], table: RowTable
) -> tuple[Int32, list[tuple[int, int]], SamplingBatch, Int32]:
    """Where and with what tokens are sampled in a step with draft tokens, and of which slots; see StepInputs."""
    last: list[int] = []
    first_samples: list[tuple[int, int]] = []
    slots: list[int] = []
    lengths: list[int] = []
    for row, wanted in enumerate(plan.samples):
        if not wanted:
            continue
        slot = plan.slots[row]
        first_samples.append((row, len(last)))
        last.append(roots[row])
        slots.append(slot)
        lengths.append(int(table.lengths[slot]))
        if (tree := trees.get(row)) is not None:
            last += tree.batch_rows
            slots += [slot] * len(tree.positions)
            lengths += [position + 1 for position in tree.positions]
    history = _history(plan, trees, first_samples, table)
    mine = np.array(slots, np.int32)
    sampling = table.sampling.take(mine, np.array(lengths, np.int32), history)
    return np.array(last, np.int32), first_samples, sampling, mine


def _history(
    plan: StepPlan, trees: Mapping[int, PlacedTree], first_samples: list[tuple[int, int]], table: RowTable
) -> History:
    """Tokens before each sample; those of branches are put together once a sample asks for one of their tree."""
    found: dict[int, list[Int32]] = {}

    def history(i: int) -> Int32:
        row, first = first_samples[bisect_right(first_samples, i, key=itemgetter(1)) - 1]
        if i == first:
            return table.known(plan.slots[row])
        if row not in found:
            found[row] = trees[row].histories(table.tokens[plan.slots[row]])
        return found[row][i - first - 1]

    return history
