"""The scheduler's side of speculation: how many draft tokens a step verifies, and how many are wanted next."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from slipstream.engine.config import EngineConfig
from slipstream.engine.operations import DraftCosts
from slipstream.engine.plan import StepPlan, StepResult, StepWork
from slipstream.engine.scheduling.controller import Decision, Offer, make_policy
from slipstream.engine.scheduling.draft_depth import LEAST_S, DraftDepth
from slipstream.engine.scheduling.draft_worth import MOST_KNOWN, PROBE_EVERY, Worth, WorthByLoad
from slipstream.engine.scheduling.kv.manager import KVManager
from slipstream.engine.scheduling.plan_builder import PlanBuilder, one_each
from slipstream.engine.scheduling.request import Request
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import DraftNeeds

log = logging.getLogger(__name__)
NOT_SEEN = "not proposed yet"
"""Reason of a step that was planned before the step after which drafters are asked again: it verifies nothing, and says
nothing about them."""
PROBE_DRAFTS, PROBE_ROWS, PROBE_ROWS_OF = 3, 8, 4
"""Draft tokens that costly drafters may propose in a probe; requests of a route they are asked for, or every fourth."""
CATCH_UP = 1024
"""Positions that costly drafters look at in one step, at most, because they were not asked in the step before: streams
feel it. A single request may have more."""
READ_PER_TOKEN = 64
"""Positions that they look at first for each token that may still come: for a few last ones reading does not pay."""
KNOWN_VERSIONS = 8
"""Versions of the shared drafter of which it is kept whether they pay."""
HELD_UP = 5.0
"""A step that takes so many times as long as expected was held up by something else (a stopped machine, another
program), and says nothing of drafts. Where steps take longer for good, that is soon expected of them."""
PLAIN_EVERY, PLAIN_EVERY_SURE = 32, 64
"""As often networks are not asked: else nobody would see any more what a step takes without. More seldom where they
surely pay, which may be a mistake about just that."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Drafters that were asked after a step."""

    worth: Worth
    seconds: float
    """What asking for all requests took."""
    few: frozenset[int] | None
    """Rows of the requests that costly drafters were asked for in a probe, if not all were."""


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
        self._cheap, self._costly = Worth(PROBE_EVERY), WorthByLoad()
        """Drafters that look up what was said, and networks: asking these may cost half a step."""
        self._versions: dict[int, WorthByLoad] = {}
        """The latter by version of the shared network; who was not used for longest comes first."""
        self._asked: _Asked | None = None
        """What was asked after the last step, if that is measured."""
        self._was_asked = False
        """Whether costly drafters were asked after the last step."""
        self._asks = False
        """Whether they are to be asked after the step planned last."""
        self._routes: Mapping[str, int] = {}
        self._steps = 0
        self._costly_drafts = 0
        """At most so many for a request are wanted of costly drafters, after the step being planned."""
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
        if prompts_wait:
            self.reasons["prompts wait"] += 1
        else:
            self._verify(plan, is_asked)

    def _verify(self, plan: PlanBuilder, is_asked: bool) -> None:
        if not any(request.offer for request in plan.requests):
            if is_asked:
                plan.decision = Decision([0] * len(plan.requests), NOT_SEEN)
                self.reasons[NOT_SEEN] += 1
            elif self._pauses and self._needs.most and self._worth(len(plan.requests)).is_paused:
                self.reasons["does not pay"] += 1
            return
        offers = [Offer(request.offer[: self._room(request)], request.num_computed) for request in plan.requests]
        plan.decision = decision = self._policy.decide(
            offers, plan.work, self._cost, self._worth(len(plan.requests)).plain_error
        )
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

    def _worth(self, requests: int) -> Worth:
        """What drafting as a whole is worth for so many."""
        return self._costly.of(requests) if self._needs.costly else self._cheap

    def wants(self, plan: PlanBuilder, prompts_wait: bool) -> tuple[list[int], list[int]]:
        """How many draft tokens are to be proposed for each row after the step, and how many by costly drafters.

        ``plan`` has all its rows. ``prompts_wait``: the step after it is one that verifies nothing, as far as is known.
        """
        self._costly_drafts = self._ask_costly(plan, prompts_wait)
        if self._costly_drafts and self._needs.own_blocks:
            self._reserve(plan)
        most = [
            self._most(request) if samples else 0 for request, samples in zip(plan.requests, plan.samples, strict=True)
        ]
        costly = [0] * len(most)
        if self._costly_drafts:
            for row in self._rows_to_ask(plan, most):
                costly[row] = min(most[row], self._costly_drafts)
                plan.requests[row].num_shown = plan.requests[row].num_computed
        self._asks = any(costly)
        is_cheap_asked = not prompts_wait and (not self._cheap.is_paused or self._is_due(self._cheap))
        return [each if is_cheap_asked or asked else 0 for each, asked in zip(most, costly, strict=True)], costly

    def _most(self, request: Request) -> int:
        """How many draft tokens could be verified after the step being planned."""
        speculation = request.message.speculation
        if not self._needs.most or speculation.mode == "off" or (self._offline_yields and request.message.offline):
            return 0
        most = self._needs.most
        if speculation.max_draft_tokens is not None:
            most = min(most, speculation.max_draft_tokens)
        # What is under way brings some tokens for sure, and the next step one after its draft tokens.
        sure = request.num_output + request.in_flight - request.unsure + 1
        return max(min(most, request.message.params.max_tokens - sure), 0)

    def _rows_to_ask(self, plan: PlanBuilder, most: Sequence[int]) -> list[int]:
        """Rows that costly drafters are asked for: those first of which they have least to catch up with.

        Where drafting does not pay these are a few of each route, and in the second step of a probe only those of the
        first.
        """

        requests = plan.requests

        def missed(row: int) -> int:
            return max(requests[row].num_computed - requests[row].num_shown, 0)

        def pays(row: int) -> bool:
            left = requests[row].message.params.max_tokens - requests[row].num_output
            return missed(row) <= max(READ_PER_TOKEN * left, self._needs.most + 1)

        room, asked = CATCH_UP, []
        few = self._pauses and self._costly.of(sum(plan.samples)).is_paused
        by_route: Counter[str] = Counter()
        for row in sorted((row for row, count in enumerate(most) if count and pays(row)), key=missed):
            late = missed(row) > self._needs.most + 1
            if late and ((few and self._asks) or (room < CATCH_UP and missed(row) > room)):
                break
            route = requests[row].message.route
            if few and by_route[route] >= max(PROBE_ROWS, len(requests) // PROBE_ROWS_OF):
                continue
            by_route[route] += 1
            room -= missed(row) if late else 0
            asked.append(row)
        return asked

    def _ask_costly(self, plan: PlanBuilder, prompts_wait: bool) -> int:
        """How many draft tokens costly drafters may propose after this step: as many as are worth it.

        While they do not pay, that is a probe now and then: of two steps, because in the first they also look at what
        came since they were asked last. Where several versions are loaded, one is on trial and has to show what it
        knows: that takes one draft token now and then.
        """
        streams = [request for request, samples in zip(plan.requests, plan.samples, strict=True) if samples]
        if not self._needs.costly or not streams:
            return 0
        is_trial = len(set(self._routes.values())) > 1 and self._steps % PROBE_EVERY == 0
        if prompts_wait:
            return int(is_trial)
        if not self._pauses:
            return self._needs.most
        worth = self._costly.of(len(streams))
        is_sure = worth.ratio >= MOST_KNOWN
        if not worth.is_paused and self._steps % (PLAIN_EVERY_SURE if is_sure else PLAIN_EVERY) == 0:
            return 0
        if not worth.is_paused or self._is_due(worth):
            work = one_each(StepWork(), streams)
            best = self._depth.best(len(streams), work, work.reads / len(streams), self._cost)
            return min(best, PROBE_DRAFTS) if worth.is_paused else best
        return int(is_trial)

    def observe(self, plan: StepPlan, decision: Decision | None, result: StepResult) -> None:
        """What the step brought; called before the cost model learns how long it took."""
        expected = self._cost.predict(plan.work_with(result.drafted))
        is_held_up = result.seconds > HELD_UP * max(expected, LEAST_S)
        if decision is not None and not is_held_up:
            self._policy.observe(decision, sum(map(len, result.tokens)), result.seconds)
        if not self._pauses or not self._needs.most:
            return
        costly = sum(map(bool, plan.costly))
        if costly and self._was_asked:
            # Not after a pause: then drafters also look at what came since.
            offers = [offer for offer, most in zip(result.offers, plan.costly, strict=True) if most]
            self._depth.observe(max(plan.costly), offers, result.draft_seconds)
        asked, self._asked = None if is_held_up else self._asked, None
        whole = self._worth(len(plan.slots))
        if not whole.is_paused and plan.num_tokens == len(plan.slots) and not is_held_up:
            whole.observe_plain(result.seconds / max(self._cost.predict(plan.work), LEAST_S))
        unseen = 0.0
        if asked is not None and decision is not None and decision.reason == NOT_SEEN:
            unseen = 0.0 if asked.worth.is_paused else asked.seconds
        elif asked is not None:
            plain = self._without_drafts(asked, plan, decision, result)
            asked.worth.observe(self._steps, plain, result.seconds + asked.seconds, len(plan.slots))
        if any(plan.wanted):
            worth = self._costly.of(len(plan.slots)) if costly else self._cheap
            if worth.is_paused:
                worth.spend(result.draft_seconds)
            if worth is self._cheap or self._was_asked or not worth.is_paused:
                self._asked = self._now_asked(worth, plan, result, unseen)
        self._was_asked = costly > 0
        for drafter in result.drafters:
            if drafter.routes and drafter.routes != self._routes:
                self._change_routes(drafter.routes)

    def _now_asked(self, worth: Worth, plan: StepPlan, result: StepResult, unseen: float) -> _Asked:
        """``unseen`` seconds took asking whose draft tokens came too late for the step after it."""
        number, seconds, few = sum(plan.samples), result.draft_seconds, None
        usual = self._depth.seconds(number, max(plan.costly, default=0)) if self._was_asked else None
        seconds = seconds if usual is None else min(seconds, HELD_UP * usual)
        if worth is not self._cheap and worth.is_paused and sum(map(bool, plan.costly)) < number:
            few = frozenset(slot for slot, most in zip(plan.slots, plan.costly, strict=True) if most)
            known = self._depth.seconds(number, min(max(map(len, result.offers)), max(plan.costly)))
            seconds = known or seconds * number / len(few)
        return _Asked(worth, seconds + unseen, few)

    def _without_drafts(self, asked: _Asked, plan: StepPlan, decision: Decision | None, result: StepResult) -> float:
        """Seconds that what the step brought would have taken without draft tokens.

        What they brought counts, not what was promised: the most promising drafts are those that chance makes look so.
        Where few requests had any, how long it takes for all is expected, as nobody measured it.
        """
        if decision is None or not decision.plain_seconds:
            return result.seconds
        counts, drafted = list(map(len, result.tokens)), sum(result.drafted)
        if asked.few is None:
            return sum(counts) / len(counts) * decision.plain_seconds
        some = [count for slot, count in zip(plan.slots, counts, strict=True) if slot in asked.few]
        if not some:
            return result.seconds
        more = round(drafted * len(counts) / len(some))
        plain = plan.work_with([0] * len(counts))
        seconds = self._cost.predict_more(plain, more, sum(plan.starts) / len(counts))
        return float(sum(some) / len(some) * seconds[0] / seconds[more] * result.seconds)

    def costs(self) -> DraftCosts:
        """What networks were seen to take."""
        return DraftCosts(self._depth.table())

    def _change_routes(self, routes: Mapping[str, int]) -> None:
        """A version nobody has seen is tried at once; of one that comes back it is known what it brings."""
        seen = {*self._versions, *self._routes.values()}
        before, now = self._routes.get(""), routes.get("")
        if before is not None:
            self._versions.pop(before, None)
            self._versions[before] = self._costly
            while len(self._versions) > KNOWN_VERSIONS:
                del self._versions[next(iter(self._versions))]
        self._routes = dict(routes)
        if before != now and now in self._versions:
            self._costly = self._versions[now]
            self._costly.wait(self._steps)
        elif before != now:
            self._costly = deepcopy(self._costly)
        if not seen.issuperset(routes.values()):
            self._costly.retry()

    def _is_due(self, worth: Worth) -> bool:
        """Whether a paused kind is to be probed; not while the draft tokens of the first probe are being verified."""
        is_verifying = self._asked is not None and self._asked.worth is worth
        return self._steps >= worth.next_probe and (worth.has_succeeded or not is_verifying)

    def take_back(self, request: Request, row: int, plan: StepPlan, result: StepResult) -> None:
        """What was computed for rejected draft tokens does not count; keeps what is offered now."""
        if request.slot >= 0:
            request.num_computed -= plan.drafts[row] - (len(result.tokens[row]) - 1)
            request.offer = result.offers[row]

    def _reserve(self, plan: PlanBuilder) -> None:
        """Blocks for the positions that drafters propose tokens for after the step, where there are plenty."""
        for request in plan.requests:
            wanted = min(self._most(request), self._costly_drafts)
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
