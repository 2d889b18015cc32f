"""How much of a step goes to prompts: as much as running streams leave of it."""

from __future__ import annotations

from collections.abc import Iterable

from slipstream.engine.config import EngineConfig
from slipstream.engine.scheduling.offline import OfflineShare
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost

DECODE_SHARE = 0.39
"""While prompts wait, running streams keep at least this share of a step, and prompts get the rest."""
MIN_CHUNK = 16
"""Prompts always advance by this many tokens a step, whatever the latency target."""


def plan_prompts(
    plan: PlanBuilder, requests: Iterable[Request], config: EngineConfig, cost: StepCost, offline: OfflineShare
) -> None:
    """Gives what the step has left to the prompts among the requests, which come most urgent first."""
    decodes = plan.work.tokens
    # Seconds this step may take while streams run.
    seconds = max(config.step_latency_ms / 1000, cost.predict(plan.work) / DECODE_SHARE)
    limit = config.max_step_tokens
    for request in requests:
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
            fits = cost.chunk_within(seconds, plan.work, request.num_computed, most)
            least = MIN_CHUNK if plan.work.tokens == decodes else 0
            most = max(fits, min(least, most))
        if most <= 0:
            return
        plan.add(request, most)
