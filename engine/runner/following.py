"""Proposals that follow a step on the device, before anybody has read what it sampled."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from slipstream.engine.models.protocol import Forward
from slipstream.engine.runner.inputs import StepInputs
from slipstream.engine.runner.rows import RowTable
from slipstream.engine.runner.sampler import Sampling
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.runner.standing import Standing
from slipstream.engine.speculation.protocol import Begun, Coming
from slipstream.engine.speculation.tree import Tree, is_chain
from slipstream.kernels.batch import Int32
from slipstream.kernels.readback import Stopwatch


@dataclass(frozen=True, slots=True)
class Following:
    """What the device proposes, or has proposed."""

    begun: Sequence[Begun] = ()
    watch: Stopwatch | None = field(default=None)
    made: dict[int, int] = field(default_factory=dict)
    """By slot: draft tokens that the next step can verify before this one is read. Empty where it cannot be launched
    before; else every row of the step has some."""

    def tell(self, told: Sequence[Int32]) -> float:
        """Hands on what came back with the step's tokens; seconds that it took the device."""
        for begun, each in zip(self.begun, told, strict=True):
            begun.tell(each)
        return 0.0 if self.watch is None else self.watch.seconds

    def tree(self, slot: int, most: int, standing: Standing) -> Tree:
        """At most so many draft tokens of a row, which only the device knows."""
        count = min(most, self.made[slot])
        return Tree(standing.drafts(slot, count), list(range(-1, count - 1)))

    def settle(self, behind: StepInputs, missed: Mapping[int, int]) -> None:
        """Tells a step that was launched behind this one what this one brought; ``missed`` by slot: what was wrong."""
        chains = {slot: begun.chain(place) for begun in self.begun for place, slot in enumerate(begun.slots)}
        for row, slot in enumerate(behind.plan.slots):
            if slot in missed:
                behind.settle(row, missed[slot], chains[slot])


def begin(inputs: StepInputs, table: RowTable, speculator: Speculator, late: Container[int]) -> list[Begun]:
    """What is to follow a step, for rows of which costly drafters are asked and that verify no branches.

    ``late``: slots of which it is not known how many draft tokens of the step before are right.
    """
    plan, first = inputs.plan, dict(inputs.first_samples)
    coming: list[Coming] = []
    for row, (slot, most) in enumerate(zip(plan.slots, plan.costly, strict=True)):
        tree = inputs.trees.get(row)
        if most and plan.samples[row] and (tree is None or is_chain(tree.tree.parents)):
            draft = table.drafts(slot).draft
            draft.most = min(most, speculator.most)
            places = int(inputs.starts[row]), plan.counts[row], int(inputs.batch.q_start[row]), first[row]
            coming.append(Coming(draft, *places, () if tree is None else tree.tree.tokens, slot in late))
    return speculator.begin(coming) if coming else []


def follow(
    begun: Sequence[Begun],
    inputs: StepInputs,
    computed: Forward,
    sampling: Sampling | None,
    speculator: Speculator,
    standing: Standing,
    can_go_on: bool,
) -> Following:
    """Has the device go on after a step, and one copy bring back what comes of both.

    The last columns of the step's batch are those that it takes, and for each the slots. For these ``standing`` is
    brought up to date; ``can_go_on``: whether the next step may begin from there.
    """
    if sampling is None:
        return Following()
    if not begun:
        sampling.send()
        return Following()
    watch = Stopwatch(sampling.tokens.device)
    columns = iter(computed.columns[len(inputs.batch.columns) :])
    samples = sampling.tokens.clamp(min=0).int()
    done, told = [], []
    made: dict[int, int] = {}
    for each in begun:
        mine, slots = list(islice(columns, len(each.arrays))), next(columns)
        if (found := speculator.follow(each, mine, computed.features, samples)) is not None:
            done.append(each)
            told.append(found[0])
            rows = found[1][:, : standing.rows.shape[1]]
            standing.rows[:, : rows.shape[1]].index_copy_(0, slots, rows)
            made |= dict.fromkeys(each.slots, rows.shape[1] - 2)
    watch.stop()
    sampling.send(told)
    is_whole = can_go_on and all(inputs.plan.samples) and made.keys() == set(inputs.plan.slots)
    return Following(done, watch, made if is_whole else {})


def slots_of(begun: Begun) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The column that goes with it."""
    return np.array(begun.slots, np.int64)
