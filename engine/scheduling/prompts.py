"""How much of a step goes to prompts: as much as running streams leave of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from math import inf

from slipstream.engine.config import EngineConfig
from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.offline import OfflineShare
from slipstream.engine.scheduling.plan_builder import PlanBuilder, one_each
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.shares import WaitingRequests, flow_of
from slipstream.engine.scheduling.step_cost import StepCost

DECODE_SHARE = 0.39
"""While prompts wait, running streams keep at least this share of a step, and prompts get the rest."""
YIELDED_SHARE = 0.15
"""The same where streams belong to flows that want more than they get, and the prompt to one that does not: what little
it asks for should take it hardly longer than if it were alone."""
STANDING_BACK = 8.0
"""In that case such streams stand back altogether, until this many steps of theirs would have been done."""
SHARED_STEP_S = 0.11
"""About how long a step may take in which prompts of a flow with a backlog are computed: whoever comes next, of a flow
that asks for little, waits for half of it. Where only one flow was ever seen, ``DECODE_SHARE`` alone says how long."""
MIN_CHUNK = 16
"""Prompts always advance by this many tokens a step, whatever the latency target."""


class PromptPlanner:
    """Step by step: first which streams stand back, then, with all others in the plan, which prompts advance."""

    def __init__(self, config: EngineConfig, cost: StepCost, waiting: WaitingRequests, offline: OfflineShare) -> None:
        self._config, self._cost, self._waiting, self._offline = config, cost, waiting, offline
        self._standing_back: Set[Request] = frozenset()
        self._stood_back = 0.0
        """Seconds of the steps in a row in which streams did."""

    def stand_back(self, running: Iterable[Request], prompts: Sequence[Request]) -> Set[Request]:
        """Streams that are not to be in the step: of flows with a backlog, for the prompt of one that wants no more.

        ``prompts`` are those that may be computed, by deadline.
        """
        self._standing_back = frozenset()
        first = next(iter(self._waiting.ordered(prompts)), None) if self._waiting.is_shared else None
        if first is not None and not first.message.offline and not self._waiting.has_backlog(first):
            ahead = self._waiting.ahead_of(first)
            streams = {each for each in running if not each.is_prompt and flow_of(each) in ahead}
            if self._stood_back < STANDING_BACK * self._cost.predict(one_each(StepWork(), streams)):
                self._standing_back = streams
        return self._standing_back

    def plan(self, plan: PlanBuilder, prompts: Iterable[Request]) -> None:
        """Gives what the step, which has its streams, has left to prompts, in their turns.

        Instead of streams that stand back prompts have what these would have taken.
        """
        config, cost, waiting = self._config, self._cost, self._waiting
        streams = [*plan.requests, *self._standing_back]
        decodes, stream_seconds = plan.work.tokens, cost.predict(one_each(plan.work, self._standing_back))
        holds_small_flow = False
        for request in waiting.ordered(prompts):
            if request.slot < 0:
                continue  # pushed out by a stream
            remaining = request.length - request.num_computed
            offline, has_backlog = request.message.offline, waiting.has_backlog(request)
            # A step with a prompt of a flow that wants no more is not filled up for those that do.
            if holds_small_flow and has_backlog:
                break
            holds_small_flow = holds_small_flow or not has_backlog
            if not config.chunked_prefill:
                if offline and plan.offline_yields and plan.requests:
                    break
                if plan.work.tokens > decodes and plan.work.tokens + remaining > config.max_step_tokens:
                    break
                plan.add(request, remaining)
                continue
            most = min(remaining, config.max_step_tokens - plan.work.tokens)
            if offline:
                most = self._offline.chunk(plan, request, most) if most > 0 else 0
            else:
                # Seconds that this step may take.
                seconds = inf
                if streams:
                    share = max(DECODE_SHARE * waiting.keeping(request, streams), YIELDED_SHARE)
                    seconds = max(config.step_latency_ms / 1000, stream_seconds / share)
                if has_backlog and waiting.has_seen_others:
                    seconds = min(seconds, SHARED_STEP_S)
                if seconds < inf:
                    fits = cost.chunk_within(seconds, plan.work, request.num_computed, most)
                    least = MIN_CHUNK if plan.work.tokens == decodes else 0
                    most = max(fits, min(least, most))
            if most <= 0:
                break
            plan.add(request, most)
        self._stood_back = self._stood_back + cost.predict(plan.work) if self._standing_back else 0.0
