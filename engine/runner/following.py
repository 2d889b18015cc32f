"""Proposals that follow a step on the device, before anybody has read what it sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from slipstream.engine.models.protocol import Forward
from slipstream.engine.runner.inputs import StepInputs
from slipstream.engine.runner.rows import RowTable
from slipstream.engine.runner.sampler import Sampling
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.speculation.protocol import Begun, Coming
from slipstream.engine.speculation.tree import is_chain
from slipstream.kernels.batch import Int32
from slipstream.kernels.readback import Stopwatch


@dataclass(frozen=True, slots=True)
class Following:
    """What the device proposes, or has proposed."""

    begun: Sequence[Begun] = ()
    watch: Stopwatch | None = field(default=None)

    def tell(self, told: Sequence[Int32]) -> float:
        """Hands on what came back with the step's tokens; seconds that it took the device."""
        for begun, each in zip(self.begun, told, strict=True):
            begun.tell(each)
        return 0.0 if self.watch is None else self.watch.seconds


def begin(inputs: StepInputs, table: RowTable, speculator: Speculator) -> list[Begun]:
    """What is to follow a step, for rows of which costly drafters are asked and that verify no branches."""
    plan, first = inputs.plan, dict(inputs.first_samples)
    coming: list[Coming] = []
    for row, most in enumerate(plan.costly):
        tree = inputs.trees.get(row)
        if most and plan.samples[row] and (tree is None or is_chain(tree.tree.parents)):
            draft = table.drafts(plan.slots[row]).draft
            draft.most = min(most, speculator.most)
            places = int(inputs.starts[row]), plan.counts[row], int(inputs.batch.q_start[row]), first[row]
            coming.append(Coming(draft, *places, () if tree is None else tree.tree.tokens))
    return speculator.begin(coming) if coming else []


def follow(begun: Sequence[Begun], computed: Forward, sampling: Sampling | None, speculator: Speculator) -> Following:
    """Has the device go on after a step, and one copy bring back what comes of both.

    The last columns of the step's batch are those that it takes.
    """
    if sampling is None:
        return Following()
    if not begun:
        sampling.send()
        return Following()
    watch = Stopwatch(sampling.tokens.device)
    columns = iter(computed.columns[-sum(len(each.arrays) for each in begun) :])
    samples = sampling.tokens.clamp(min=0).int()
    made, told = [], []
    for each in begun:
        mine = list(islice(columns, len(each.arrays)))
        if (found := speculator.follow(each, mine, computed.features, samples)) is not None:
            made.append(each)
            told.append(found)
    watch.stop()
    sampling.send(told)
    return Following(made, watch)
