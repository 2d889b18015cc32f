"""How much of a step goes to prompts: as much as running streams leave of it."""

from __future__ import annotations

from collections.abc import Iterable

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
MIN_CHUNK = 16
"""Prompts always advance by this many tokens a step, whatever the latency target."""


def plan_prompts(
    plan: PlanBuilder,
    requests: Iterable[Request],
    waiting: WaitingRequests,
    config: EngineConfig,
    cost: StepCost,
    offline: OfflineShare,
) -> None:
    """Gives what the step, which has the streams already, has left to prompts among the requests, in their turns."""
    streams = list(plan.requests)
    decodes, stream_seconds = plan.work.tokens, cost.predict(plan.work)
    limit = config.max_step_tokens
    for request in waiting.ordered(requests):
        remaining = request.length - request.num_computed
        if remaining <= 1:
            continue
        if not config.chunked_prefill:
            if request.message.offline and plan.offline_yields and plan.requests:
                return
            if plan.work.tokens > decodes and plan.work.tokens + remaining > limit:
                return
            plan.add(request, remaining)
            continue
        most = min(remaining, limit - plan.work.tokens)
        if request.message.offline:
            most = offline.chunk(plan, request, most) if most > 0 else 0
        elif decodes:
            share = max(DECODE_SHARE * waiting.keeping(request, streams), YIELDED_SHARE)
            # Seconds this step may take while streams run.
            seconds = max(config.step_latency_ms / 1000, stream_seconds / share)
            fits = cost.chunk_within(seconds, plan.work, request.num_computed, most)
            least = MIN_CHUNK if plan.work.tokens == decodes else 0
            most = max(fits, min(least, most))
        if most <= 0:
            return
        plan.add(request, most)
