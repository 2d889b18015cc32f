"""The scheduler's side of speculation: which of the offered guesses a step verifies, and how many are wanted next."""

from __future__ import annotations

import logging
from collections import Counter

from slipstream.engine.config import EngineConfig
from slipstream.engine.kv.manager import KVManager
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.plan_builder import PlanBuilder
from slipstream.engine.request import Request
from slipstream.engine.speculation.controller import Decision, Offer, make_policy
from slipstream.engine.step_cost import StepCost

log = logging.getLogger(__name__)
PAUSE_BELOW = 0.985
"""Where verification and drafting together bring less than this, drafting pauses …"""
PROBE_EVERY = 16
"""… but for one step in so many, to see whether that has changed."""
SMOOTHING, PROBE_SMOOTHING = 0.03, 0.15
"""Weight of a step in what is known of this, and of a probe, of which there are few."""


class GuessPlanner:
    """Knows requests by what they offer; which drafter an offer comes from is the runner's business."""

    def __init__(
        self, config: EngineConfig, max_model_len: int, switch_length: int, kv: KVManager, cost: StepCost
    ) -> None:
        self.reasons: Counter[str] = Counter()
        """Steps by the reason for the number of guesses verified in them."""
        self._most = config.max_draft_tokens if config.speculation != "off" else 0
        self._max_model_len = max_model_len
        self._switch_length = switch_length
        self._kv = kv
        self._cost = cost
        self._policy = make_policy(config.speculation_policy, config.max_draft_tokens)
        self._pauses = config.speculation_policy == "throughput"
        self._reserves = config.drafter is not None or config.draft_model is not None
        self._worth = 1.0
        """Tokens per second with drafting and verification, relative to doing without; smoothed."""
        self._steps = 0

    def plan(self, plan: PlanBuilder, prompts_wait: bool) -> None:
        """Adds positions to verify guesses in, where they are worth it and there is room, to a step of decodes.

        A step that prompts share is bound by arithmetic: guesses would cost their full price, and prolong it.
        """
        self._steps += 1
        if prompts_wait:
            self.reasons["prompts wait"] += 1
        else:
            self._verify(plan)
        if self._reserves:
            self._reserve(plan)

    def _verify(self, plan: PlanBuilder) -> None:
        if not any(request.offer for request in plan.requests):
            return
        offers = [Offer(request.offer[: self._room(request)], request.num_computed) for request in plan.requests]
        plan.decision = decision = self._policy.decide(offers, plan.work, self._cost)
        self.reasons[decision.reason] += 1
        if log.isEnabledFor(logging.DEBUG):
            chances = [[round(chance, 2) for chance in offer.chances] for offer in offers]
            log.debug("%s: verify %s of %s", decision.reason, decision.counts, chances)
        for row, count in enumerate(decision.counts):
            request = plan.requests[row]
            grown = self._kv.grow(request, len(request.tokens) + count) if count else None
            if grown is not None:
                plan.map_grown(request, grown)
                plan.add_guesses(row, count)

    def wanted(self, request: Request) -> int:
        """How many guesses could be verified after the step being planned."""
        speculation = request.message.speculation
        if not self._most or speculation.mode == "off":
            return 0
        if self._worth < PAUSE_BELOW and self._steps % PROBE_EVERY:
            return 0
        most = self._most if speculation.max_draft_tokens is None else min(self._most, speculation.max_draft_tokens)
        # The step being planned draws a token, and the next one after its guesses another.
        return max(min(most, request.message.params.max_tokens - request.num_output - 2), 0)

    def observe(self, plan: StepPlan, decision: Decision | None, result: StepResult) -> None:
        """What the step brought."""
        tokens = sum(map(len, result.tokens))
        if decision is not None:
            self._policy.observe(decision, tokens, result.seconds)
        if self._pauses and (decision is not None or any(plan.wanted)):
            # What it brought, not what was promised: the most promising guesses are those that chance makes look so.
            gain = 1.0
            if decision is not None and decision.plain_seconds:
                gain = tokens / len(result.tokens) * decision.plain_seconds / result.seconds
            worth = gain * result.seconds / (result.seconds + result.draft_seconds)
            smoothing = PROBE_SMOOTHING if self._worth < PAUSE_BELOW else SMOOTHING
            self._worth += smoothing * (worth - self._worth)

    def take_back(self, request: Request, row: int, plan: StepPlan, result: StepResult) -> None:
        """What was computed for guesses that were wrong does not count; keeps what is offered now."""
        if request.slot >= 0:
            request.num_computed -= plan.drafts[row] - (len(result.tokens[row]) - 1)
            request.offer = result.offers[row]

    def _reserve(self, plan: PlanBuilder) -> None:
        """Blocks for the positions a head drafts in after the step, where there are plenty."""
        for request in plan.requests:
            wanted = self.wanted(request)
            if wanted and self._kv.pool.num_available > 2 * len(plan.requests):
                plan.map_grown(request, self._kv.grow(request, request.num_computed + 1 + wanted) or 0)

    def _room(self, request: Request) -> int:
        """Guesses that fit before the request's end, with the token drawn after them."""
        tokens = request.message.params.max_tokens - request.num_output - 1
        # Guesses beyond the switch length would be computed as in a sequence that stays below it.
        longest = self._max_model_len if request.outgrown else self._switch_length
        return max(min(tokens, longest - len(request.tokens)), 0)
