"""The scheduler's side of speculation: how many draft tokens a step verifies, and how many are wanted next."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from slipstream.engine.config import EngineConfig
from slipstream.engine.plan import StepPlan, StepResult
from slipstream.engine.scheduling.controller import Decision, Offer, make_policy
from slipstream.engine.scheduling.draft_depth import DraftDepth
from slipstream.engine.scheduling.kv.manager import KVManager
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import DraftNeeds

log = logging.getLogger(__name__)
NOT_SEEN = "not proposed yet"
"""Reason of a step that was planned before the step after which drafters are asked again: it verifies nothing, and says
nothing about them."""
PAUSE_BELOW = 0.985
"""Where verification and drafting together bring less than this, drafting pauses …"""
PROBE_EVERY = 16
"""… but for a probe after so many steps, to see whether that has changed."""
LONGEST_PAUSE = 256
"""Each probe of costly drafters that disappoints makes their pause twice as long, up to this."""
PROBE_DRAFTS = 3
"""Draft tokens that costly drafters may propose in a probe."""
SMOOTHING, PROBE_SMOOTHING = 0.03, 0.15
"""Weight of a step in what is known of this, and of a probe, of which there are few."""


class Worth:
    """Whether a kind of drafters pays, and when it is asked though it did not."""

    def __init__(self, longest_pause: int) -> None:
        self.ratio = 1.0
        """Tokens per second with drafting and verification, relative to doing without; smoothed."""
        self._longest = longest_pause
        self._pause = PROBE_EVERY
        self.next_probe = 0
        """The step; only where it is paused."""

    @property
    def is_paused(self) -> bool:
        return self.ratio < PAUSE_BELOW

    def observe(self, step: int, ratio: float) -> None:
        """What a step with it brought."""
        was_paused = self.is_paused
        self.ratio += (PROBE_SMOOTHING if was_paused else SMOOTHING) * (ratio - self.ratio)
        disappoints = was_paused and ratio < PAUSE_BELOW
        self._pause = min(2 * self._pause, self._longest) if disappoints else PROBE_EVERY
        self.next_probe = step + self._pause

    def retry(self) -> None:
        """Something has changed: what disappointed before may pay now."""
        self._pause, self.next_probe = PROBE_EVERY, 0


class DraftPlanner:
    """Knows requests by what they offer; which drafter an offer comes from is the runner's business."""

    def __init__(
        self,
        config: EngineConfig,
        max_model_len: int,
        switch_length: int,
        kv: KVManager,
        cost: StepCost,
        needs: DraftNeeds,
    ) -> None:
        """``needs`` are those of the runner's drafters together."""
        self.reasons: Counter[str] = Counter()
        """Steps by the reason for the number of draft tokens verified in them."""
        self._needs = needs
        self._max_model_len = max_model_len
        self._switch_length = switch_length
        self._kv = kv
        self._cost = cost
        self._policy = make_policy(config.speculation_policy, config.max_draft_tokens)
        self._pauses = config.speculation_policy == "throughput"
        self._depth = DraftDepth(needs.most)
        self._cheap, self._costly = Worth(PROBE_EVERY), Worth(LONGEST_PAUSE)
        """Drafters that look up what was said, and networks: asking these may cost half a step."""
        self._asked: tuple[Worth, float] | None = None
        """What was asked after the last step, and which share of the time it left for the step; None: not measured."""
        self._was_asked = False
        """Whether costly drafters were asked after the last step."""
        self._routes: Mapping[str, int] = {}
        self._steps = 0
        self.costly_drafts = 0
        """At most so many for each request are wanted of costly drafters, after the step being planned."""
        self._offline_yields = False
        """Whether offline requests do without in the step being planned."""

    def plan(self, plan: PlanBuilder, prompts_wait: bool, is_asked: bool = False) -> None:
        """Adds positions to verify draft tokens in, where they are worth it and there is room, to a step of decodes.

        A step that prompts share is bound by arithmetic: draft tokens would cost their full price, and prolong it.
        ``is_asked``: a step under way will have draft tokens proposed, which are verified in this one. What was offered
        after the step before it has to do for deciding how many: where much was promised, much will be.
        """
        self._steps += 1
        self._offline_yields = plan.offline_yields
        self.costly_drafts = self._ask_costly(plan)
        if prompts_wait:
            self.reasons["prompts wait"] += 1
        else:
            self._verify(plan, is_asked)
        if self.costly_drafts and self._needs.own_blocks:
            self._reserve(plan)

    def _verify(self, plan: PlanBuilder, is_asked: bool) -> None:
        if not any(request.offer for request in plan.requests):
            if is_asked:
                plan.decision = Decision([0] * len(plan.requests), NOT_SEEN)
                self.reasons[NOT_SEEN] += 1
            elif self._pauses and self._needs.most and (self._costly if self._needs.costly else self._cheap).is_paused:
                self.reasons["does not pay"] += 1
            return
        offers = [Offer(request.offer[: self._room(request)], request.num_computed) for request in plan.requests]
        plan.decision = decision = self._policy.decide(offers, plan.work, self._cost)
        self.reasons[decision.reason] += 1
        if log.isEnabledFor(logging.DEBUG):
            chances = [[round(chance, 2) for chance in offer.chances] for offer in offers]
            log.debug("%s: verify %s of %s", decision.reason, decision.counts, chances)
        for row, count in enumerate(decision.counts):
            request = plan.requests[row]
            grown = self._kv.grow(request, request.num_computed + count) if count else None
            if grown is not None:
                plan.map_grown(request, grown)
                plan.add_drafts(row, count)

    def wanted(self, request: Request) -> int:
        """How many draft tokens could be verified after the step being planned."""
        speculation = request.message.speculation
        if not self._needs.most or speculation.mode == "off" or (self._offline_yields and request.message.offline):
            return 0
        if not self.costly_drafts and self._cheap.is_paused and not self._is_due(self._cheap):
            return 0
        most = self._needs.most
        if speculation.max_draft_tokens is not None:
            most = min(most, speculation.max_draft_tokens)
        # What is under way brings some tokens for sure, and the next step one after its draft tokens.
        sure = request.num_output + request.in_flight - request.unsure + 1
        return max(min(most, request.message.params.max_tokens - sure), 0)

    def _ask_costly(self, plan: PlanBuilder) -> int:
        """How many draft tokens costly drafters may propose after this step: as many as are worth it.

        While they do not pay, that is a probe now and then: of two steps, because in the first they also look at what
        came since they were asked last. Where several versions are loaded, one is on trial and has to show what it
        knows: that takes one draft token now and then.
        """
        if not self._needs.costly:
            return 0
        if not self._pauses:
            return self._needs.most
        if not self._costly.is_paused or self._is_due(self._costly):
            start = sum(request.num_computed for request in plan.requests) / max(len(plan.requests), 1)
            best = self._depth.best(len(plan.requests), plan.work, start, self._cost)
            return min(best, PROBE_DRAFTS) if self._costly.is_paused else best
        return 1 if len(set(self._routes.values())) > 1 and self._steps % PROBE_EVERY == 0 else 0

    def observe(self, plan: StepPlan, decision: Decision | None, result: StepResult) -> None:
        """What the step brought."""
        tokens = sum(map(len, result.tokens))
        if decision is not None:
            self._policy.observe(decision, tokens, result.seconds)
        if not self._pauses:
            return
        if plan.costly_drafts and self._was_asked:
            # Not after a pause: then drafters also look at what came since.
            self._depth.observe(plan.costly_drafts, result.offers, result.draft_seconds)
        asked, self._asked = self._asked, None
        if asked is not None and (decision is None or decision.reason != NOT_SEEN):
            # What it brought, not what was promised: the most promising drafts are those that chance makes look so.
            gain = 1.0
            if decision is not None and decision.plain_seconds:
                gain = tokens / len(result.tokens) * decision.plain_seconds / result.seconds
            worth, share = asked
            worth.observe(self._steps, gain * share)
        if any(plan.wanted):
            worth = self._costly if plan.costly_drafts else self._cheap
            share = result.seconds / (result.seconds + result.draft_seconds)
            if worth is self._cheap or self._was_asked or not worth.is_paused:
                self._asked = worth, share
        self._was_asked = bool(plan.costly_drafts) and any(plan.wanted)
        for drafter in result.drafters:
            if drafter.routes and drafter.routes != self._routes:
                self._routes = dict(drafter.routes)
                self._costly.retry()

    def _is_due(self, worth: Worth) -> bool:
        """Whether a paused kind is to be probed; not while the draft tokens of a probe are being verified."""
        return self._steps >= worth.next_probe and (self._asked is None or self._asked[0] is not worth)

    def take_back(self, request: Request, row: int, plan: StepPlan, result: StepResult) -> None:
        """What was computed for rejected draft tokens does not count; keeps what is offered now."""
        if request.slot >= 0:
            request.num_computed -= plan.drafts[row] - (len(result.tokens[row]) - 1)
            request.offer = result.offers[row]

    def _reserve(self, plan: PlanBuilder) -> None:
        """Blocks for the positions that drafters propose tokens for after the step, where there are plenty."""
        for request in plan.requests:
            wanted = min(self.wanted(request), self.costly_drafts)
            if wanted and self._kv.pool.num_available > 2 * len(plan.requests):
                length = min(request.num_computed + 1 + wanted, self._max_model_len)
                plan.map_grown(request, self._kv.grow(request, length) or 0)

    def _room(self, request: Request) -> int:
        """Draft tokens that fit before the request's end, with the token sampled after them."""
        if self._offline_yields and request.message.offline:
            return 0
        tokens = request.message.params.max_tokens - request.num_output - request.in_flight + request.unsure
        # Draft tokens beyond the switch length would be computed as in a sequence that stays below it.
        longest = self._max_model_len if request.outgrown else self._switch_length
        return max(min(tokens, longest - (request.length - 1)), 0)
