"""Requests that wait, and whose turn it is: flows get their shares of the machine, whatever each of them sends.

Within a flow the earliest deadline goes first (``queue_order``). Between flows it is the one that has had least of the
machine, by its weight, since both want it: seconds of steps, as in start-time fair queueing and in the virtual token
counters of Sheng et al. (2024). Who was away gets no credit for that. A level of priority is worth a fixed time here as
there, so urgent requests of one flow pass those of others by a bounded amount of work.

With one flow all this is the order of deadlines. Offline requests of a flow are a flow of their own, which comes after
all that are not, so that they cost their sender nothing of his share.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from operator import attrgetter

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.queue_order import seconds_back
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost

REMEMBERED_FLOWS = 1024
_deadline = attrgetter("deadline")
Flow = tuple[str, bool]
"""Its name, and whether it consists of offline requests."""


def flow_of(request: Request) -> Flow:
    return request.message.flow, request.message.offline


class WaitingRequests:
    """The queue. It is told of every request from its arrival to its end, since flows share while they have any."""

    def __init__(self, priority_step_s: float) -> None:
        self._priority_step_s = priority_step_s
        self._queues: dict[Flow, list[Request]] = {}  # by flow; each by deadline, and none empty
        self._open: Counter[Flow] = Counter()
        """Requests per flow that have not ended."""
        self._used: OrderedDict[Flow, float] = OrderedDict()
        """Seconds by weight that flows have had, as far as that is remembered; least recently open first."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def add(self, request: Request) -> None:
        insort(self._queues.setdefault(flow_of(request), []), request, key=_deadline)

    def remove(self, request: Request) -> None:
        flow = flow_of(request)
        self._queues[flow].remove(request)
        if not self._queues[flow]:
            del self._queues[flow]

    # Shares ---------------------------------------------------------------------------------------------------------

    @property
    def is_shared(self) -> bool:
        """Whether there is more than one flow; else nobody has to be charged."""
        return len(self._open) > 1

    def opened(self, request: Request) -> None:
        """A request has come."""
        flow = flow_of(request)
        if flow not in self._open:
            level = min((self._used[other] for other in self._open if other[1] == flow[1]), default=0.0)
            self._used[flow] = max(self._used.get(flow, 0.0), level)
        self._used.move_to_end(flow)
        self._open[flow] += 1
        while len(self._used) > max(REMEMBERED_FLOWS, len(self._open)):
            oldest = next(found for found in self._used if found not in self._open)
            del self._used[oldest]

    def ended(self, request: Request) -> None:
        flow = flow_of(request)
        self._open[flow] -= 1
        if not self._open[flow]:
            del self._open[flow]

    def charge(self, request: Request, seconds: float) -> None:
        """Its flow has had so much of the machine."""
        if (flow := flow_of(request)) in self._used:
            self._used[flow] += seconds / request.message.weight

    def charge_prompt(self, request: Request, cost: StepCost) -> None:
        """A request begins: its flow is charged what computing it will probably take, up to its last known token."""
        if self.is_shared:
            work = StepWork().add(request.num_computed, len(request.tokens) - request.num_computed)
            self.charge(request, cost.predict(work))

    # Turns ----------------------------------------------------------------------------------------------------------

    def in_turn(self) -> Iterator[Request]:
        """Those that wait now, each when it is its turn by what was charged until then."""
        if len(self._queues) == 1:
            yield from list(*self._queues.values())
            return
        rest = {flow: iter(list(queue)) for flow, queue in self._queues.items()}
        heads = {flow: next(queue) for flow, queue in rest.items()}
        while heads:
            flow = min(heads, key=lambda flow: (self._level(heads[flow]), heads[flow].deadline))
            yield heads.pop(flow)
            if (following := next(rest[flow], None)) is not None:
                heads[flow] = following

    def ordered(self, requests: Iterable[Request]) -> Iterable[Request]:
        """Requests that come by deadline, in the order in which their prompts are computed."""
        return sorted(requests, key=self._level) if self.is_shared else requests

    def prompts_before(self, request: Request, running: Iterable[Request]) -> int:
        """Positions that running requests have to compute of their prompts before it is this one's turn."""
        left = 0
        for other in running:
            missing = other.length - other.num_computed
            if missing > 1 and self._passes(other, request):
                left += missing
        return left

    def _passes(self, one: Request, other: Request) -> bool:
        if flow_of(one) == flow_of(other):
            return one.deadline <= other.deadline
        return self._level(one) <= self._level(other)

    def _level(self, request: Request) -> float:
        return self._used[flow_of(request)] + seconds_back(request.message, self._priority_step_s)
