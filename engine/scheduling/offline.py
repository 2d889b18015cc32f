"""Offline requests, for whose answers nobody waits: they get what others leave of the machine.

While others run, offline requests may prolong their steps by ``--offline-share`` on average: each step of the others
brings that share of its time as credit, which is spent on what it suffices for, a row or a small piece of a prompt.
While others have prompts to compute, offline requests stand still. Alone they have the machine to themselves, in steps
of about ``--offline-step-ms``, since that is how long somebody who comes then waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from slipstream.engine.config import EngineConfig
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost

LEAST_CHUNK = 16
"""A prompt advances by this many tokens at least, or not at all; credit is saved up to what that takes."""


class OfflineShare:
    """Decides, step by step, how far offline requests advance."""

    def __init__(self, config: EngineConfig, cost: StepCost, awaits_result: Callable[[Request], bool]) -> None:
        self._share, self._seconds, self._cost = config.offline_share, config.offline_step_ms / 1000, cost
        self._awaits_result = awaits_result
        self._credit = 0.0
        """Seconds that offline requests may take of the step being planned."""
        self._saved = 0.0
        """What steps of others have brought so far."""

    def decodes(self, running: Iterable[Request], plan: PlanBuilder) -> Iterator[Request]:
        """Which of the running requests may advance by a token if that is what they need, others before offline ones.

        Each has to be in the plan before the next is asked for.
        """
        offline: list[Request] = []
        prompts_wait = False
        for request in running:
            if request.message.offline:
                offline.append(request)
            else:
                plan.offline_yields = True
                prompts_wait |= request.length - request.num_computed > 1
                yield request
        self._begin(plan, prompts_wait, max((each.num_computed for each in offline), default=0))
        for request in () if prompts_wait else offline:
            if request.length - request.num_computed != 1 or self._awaits_result(request):
                continue
            if not self._pay(plan, request, 1):
                return
            yield request

    def chunk(self, plan: PlanBuilder, request: Request, most: int) -> int:
        """How many tokens of an offline request's prompt to compute in the step, at most ``most``; 0: none."""
        least = min(LEAST_CHUNK, most)
        within = self._cost.predict(plan.work) + self._credit
        count = max(least, self._cost.chunk_within(within, plan.work, request.num_computed, most))
        return count if self._pay(plan, request, count) else 0

    def _begin(self, plan: PlanBuilder, prompts_wait: bool, longest: int) -> None:
        """The plan has all tokens of others; ``longest`` is how far the longest offline request is computed."""
        if not plan.offline_yields:
            self._credit = self._seconds
        elif prompts_wait or not plan.work.tokens:
            self._credit = 0.0
        else:
            plain = self._cost.predict(plan.work)
            most = self._cost.predict(plan.work.add(longest, LEAST_CHUNK)) - plain
            self._credit = self._saved = min(self._saved, most) + self._share * plain

    def _pay(self, plan: PlanBuilder, request: Request, count: int) -> bool:
        """Whether the request may advance by so much; the first of a step may, where the machine would stand idle."""
        work = plan.work
        price = self._cost.predict(work.add(request.num_computed, count))
        price -= self._cost.predict(work) if work.tokens else 0.0
        if price > self._credit and work.tokens:
            return False
        self._credit -= price
        if plan.offline_yields and work.tokens:
            self._saved -= price
        return True


def prompts_wait(running: Iterable[Request], plan: PlanBuilder) -> bool:
    """Whether a step of decodes is to be shared with prompts; not with those of offline requests that yield."""
    return any(
        each.length - each.num_computed > 1 for each in running if not (plan.offline_yields and each.message.offline)
    )
