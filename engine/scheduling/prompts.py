"""How much of a step goes to prompts: as much as running streams leave of it."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from slipstream.engine.config import EngineConfig
from slipstream.engine.scheduling.offline import OfflineShare
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.shares import WaitingRequests
from slipstream.engine.scheduling.step_cost import StepCost

DECODE_SHARE = 0.39
"""While prompts wait, running streams keep at least this share of a step, and prompts get the rest."""
YIELDED_SHARE = 0.15
"""The same where streams belong to flows that want more than they get, and the prompt to one that does not: what little
it asks for should take it hardly longer than if it were alone."""
SHARED_STEP_S = 0.12
"""About how long a step may take in which prompts of a flow with a backlog are computed: whoever comes next, of a flow
that asks for little, waits for half of it. Where only one flow was ever seen, ``DECODE_SHARE`` alone says how long."""
MIN_CHUNK = 16
"""Prompts always advance by this many tokens a step, whatever the latency target."""


def plan_prompts(
    plan: PlanBuilder,
    requests: Iterable[Request],
    waiting: WaitingRequests,
    config: EngineConfig,
    cost: StepCost,
    offline_share: OfflineShare,
) -> None:
    """Gives what the step, which has the streams already, has left to prompts among the requests, in their turns."""
    streams = list(plan.requests)
    decodes, stream_seconds = plan.work.tokens, cost.predict(plan.work)
    limit = config.max_step_tokens
    holds_small_flow = False
    for request in waiting.ordered(requests):
        remaining = request.length - request.num_computed
        if remaining <= 1:
            continue
        offline, has_backlog = request.message.offline, waiting.has_backlog(request)
        # A step with a prompt of a flow that wants no more is not filled up for those that do.
        if holds_small_flow and has_backlog:
            return
        holds_small_flow = holds_small_flow or not has_backlog
        if not config.chunked_prefill:
            if offline and plan.offline_yields and plan.requests:
                return
            if plan.work.tokens > decodes and plan.work.tokens + remaining > limit:
                return
            plan.add(request, remaining)
            continue
        most = min(remaining, limit - plan.work.tokens)
        if offline:
            most = offline_share.chunk(plan, request, most) if most > 0 else 0
        else:
            # Seconds that this step may take.
            seconds = inf
            if decodes:
                share = max(DECODE_SHARE * waiting.keeping(request, streams), YIELDED_SHARE)
                seconds = max(config.step_latency_ms / 1000, stream_seconds / share)
            if has_backlog and waiting.has_seen_others:
                seconds = min(seconds, SHARED_STEP_S)
            if seconds < inf:
                fits = cost.chunk_within(seconds, plan.work, request.num_computed, most)
                least = MIN_CHUNK if plan.work.tokens == decodes else 0
                most = max(fits, min(least, most))
        if most <= 0:
            return
        plan.add(request, most)
