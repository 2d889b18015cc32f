"""Requests that wait, and whose turn it is: flows get their shares of the machine, whatever each of them sends.

Within a flow the earliest deadline goes first (``queue_order``). Between flows it is the one that has had least of the
machine, by its weight: seconds of steps, as in start-time fair queueing and in the virtual token counters of Sheng et
al. (2024). Who asks for little, or was away, keeps a credit of ``CREDIT_S``, so that what he asks for at once need not
wait for the others to have had as much. A prompt that has begun keeps its turn: it is not passed by others because its
flow was charged for it. A level of priority is worth a fixed time here as there, so urgent requests of one flow pass
those of others by a bounded amount of work.

With one flow all this is the order of deadlines. Offline requests of a flow are a flow of their own, which comes after
all that are not, so that they cost their sender nothing of his share.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.queue_order import seconds_back
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost

REMEMBERED_FLOWS = 1024
CREDIT_S = 2.0
"""By so much less of the machine than who has had most a flow goes first; what it had less than that is forgotten."""
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
        self._most = {False: 0.0, True: 0.0}
        """The most that a flow has had, of those that are not offline and of those that are."""

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

    @property
    def has_seen_others(self) -> bool:
        """Whether requests of more than one flow have come, now or before."""
        return len(self._used) > 1

    def has_backlog(self, request: Request) -> bool:
        """Whether its flow has more requests waiting."""
        return flow_of(request) in self._queues

    def opened(self, request: Request, running: Iterable[Request]) -> None:
        """A request has come, of a flow that has now had at most ``CREDIT_S`` less than who has had most, not counting
        prompts under way.

        ``running``: all requests that have begun.
        """
        flow = flow_of(request)
        under_way = self._under_way(running)
        for other in self._open:
            self._reach(other, under_way.get(other, self._used[other]))
        least = self._most[request.message.offline] - CREDIT_S
        self._used[flow] = max(self._used.get(flow, least), least)
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
            self._reach(flow, self._used[flow])

    def charge(self, request: Request, seconds: float) -> None:
        """Its flow has had so much of the machine."""
        if (flow := flow_of(request)) in self._used:
            self._used[flow] += seconds / request.message.weight

    def charge_prompt(self, request: Request, cost: StepCost) -> None:
        """A request begins: its flow is charged what computing it will probably take, up to its last known token."""
        request.turn = self._used[flow_of(request)]
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
            flow = min(heads, key=lambda flow: (self._place(heads[flow], self._used), heads[flow].deadline))
            yield heads.pop(flow)
            if (following := next(rest[flow], None)) is not None:
                heads[flow] = following

    def ordered(self, requests: Iterable[Request]) -> Iterable[Request]:
        """Those of the requests, which come by deadline, whose prompts are to be computed, in that order."""
        if not self.is_shared:
            return requests
        prompts = [each for each in requests if each.is_prompt]
        levels = self._under_way(prompts)
        return sorted(prompts, key=lambda each: self._place(each, levels))

    def keeping(self, prompt: Request, streams: Sequence[Request]) -> float:
        """The share of streams that keep their pace while this prompt is computed: those of flows that have no more
        requests waiting, or have had less than the prompt's flow. Where that has more waiting itself, all do."""
        if not streams or not self.is_shared or self.has_backlog(prompt):
            return 1.0
        ahead = self.ahead_of(prompt)
        return sum(flow_of(stream) not in ahead for stream in streams) / len(streams)

    def ahead_of(self, prompt: Request) -> set[Flow]:
        """Flows with a backlog that have had as much of the machine as the prompt's, or more."""
        return {flow for flow in self._queues if self._used[flow] >= prompt.turn}

    def prompts_before(self, request: Request, running: Iterable[Request]) -> int:
        """Positions that running requests have to compute of their prompts before it is this one's turn."""
        prompts = [each for each in running if each.is_prompt]
        levels = self._under_way(prompts)
        own = self._place(request, self._used)
        left = 0
        for other in prompts:
            if flow_of(other) == flow_of(request):
                passes = other.deadline <= request.deadline
            else:
                passes = self._place(other, levels) <= own
            left += passes * (other.length - other.num_computed)
        return left

    @staticmethod
    def _under_way(running: Iterable[Request]) -> dict[Flow, float]:
        """Where flows stand whose prompts are being computed: where the oldest of these began."""
        levels: dict[Flow, float] = {}
        for each in running:
            if each.is_prompt:
                levels[flow_of(each)] = min(levels.get(flow_of(each), each.turn), each.turn)
        return levels

    def _reach(self, flow: Flow, level: float) -> None:
        self._most[flow[1]] = max(self._most[flow[1]], level)

    def _place(self, request: Request, levels: Mapping[Flow, float]) -> tuple[float, int]:
        """Between flows the lowest goes first; at the same level, who asks for less."""
        flow = flow_of(request)
        return levels[flow] + seconds_back(request.message, self._priority_step_s), self._open[flow]
