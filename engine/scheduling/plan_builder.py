"""A step plan in the making."""

from __future__ import annotations

from collections.abc import Iterable

from slipstream.engine.plan import NewRow, StepPlan, StepWork
from slipstream.engine.scheduling.controller import Decision
from slipstream.engine.scheduling.request import Request


class PlanBuilder:
    """Collects what the scheduler decides, request by request; keeps the requests' own books with it."""

    def __init__(self) -> None:
        self.new: list[NewRow] = []
        self.blocks: list[tuple[int, int, list[int]]] = []
        self.copies: list[tuple[int, int]] = []
        self.requests: list[Request] = []
        self.work = StepWork()
        self.decision: Decision | None = None
        self.offline_yields = False
        """Whether others run, too, for whose sake offline requests get little of the step."""
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._drafts: list[int] = []
        self.samples: list[bool] = []

    def map_grown(self, request: Request, grown: int) -> None:
        """The request got so many blocks more."""
        if grown:
            self.blocks.append((request.slot, len(request.blocks) - grown, request.blocks[-grown:]))

    def add(self, request: Request, count: int) -> None:
        """The request advances by ``count`` known positions, and by a sampled one where they are the last."""
        start = request.num_computed
        sample = start + count == request.length
        self.requests.append(request)
        self._starts.append(start)
        self._counts.append(count)
        self._drafts.append(0)
        self.samples.append(sample)
        self.work = self.work.add(start, count)
        request.num_computed += count
        request.in_flight += sample

    def add_drafts(self, row: int, count: int) -> None:
        """Positions that hold draft tokens, at most so many, follow the last known one of a row."""
        request = self.requests[row]
        self._drafts[row] = count
        self.work = self.work.extend(request.num_computed, count)
        request.num_computed += count
        request.in_flight += count
        request.unsure += count

    def remove_row(self, slot: int) -> None:
        """A request admitted in this very step is undone as if it had not been."""
        self.new = [row for row in self.new if row.slot != slot]
        self.blocks = [entry for entry in self.blocks if entry[0] != slot]

    def build(self, step: int, ended: list[tuple[int, int]], wanted: list[int], costly: list[int]) -> StepPlan:
        return StepPlan(
            step=step,
            new=self.new,
            blocks=self.blocks,
            copies=self.copies,
            ended=ended,
            slots=[request.slot for request in self.requests],
            starts=self._starts,
            counts=self._counts,
            drafts=self._drafts,
            samples=self.samples,
            wanted=wanted,
            costly=costly,
            work=self.work,
        )


def one_each(work: StepWork, streams: Iterable[Request]) -> StepWork:
    """``work`` and one token more of each of these."""
    for stream in streams:
        work = work.add(stream.num_computed, 1)
    return work
