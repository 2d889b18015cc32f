"""Decides what the next step computes, and digests what it brought."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Set
from operator import attrgetter
from typing import Any

from slipstream.engine.config import EngineConfig
from slipstream.engine.listening import EndedRequest, Listeners
from slipstream.engine.messages import EngineStats, FinishReason, NewRequest, TokenDelta
from slipstream.engine.operations import PauseMode, UpdateMode
from slipstream.engine.plan import NO_DRAFT, PLAIN, LoadedAdapter, StepPlan, StepResult
from slipstream.engine.scheduling.controller import Decision
from slipstream.engine.scheduling.draft_planner import DraftPlanner
from slipstream.engine.scheduling.kv.manager import Admission, KVManager, Wait
from slipstream.engine.scheduling.offline import OfflineShare, prompts_wait
from slipstream.engine.scheduling.plan_builder import PlanBuilder
from slipstream.engine.scheduling.prompts import PromptPlanner
from slipstream.engine.scheduling.queue_order import QueueOrder
from slipstream.engine.scheduling.request import Request, check_rows
from slipstream.engine.scheduling.shares import WaitingRequests
from slipstream.engine.scheduling.standstill import Standstill
from slipstream.engine.scheduling.step_cost import StepCost
from slipstream.engine.speculation.protocol import DraftNeeds

_deadline = attrgetter("deadline")
NO_DRAFTING, NO_LISTENERS = DraftNeeds(), Listeners()


class Scheduler:
    """Holds every request from arrival to its last delta. Not thread-safe; the step loop owns it."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        cost: StepCost,
        clock: Callable[[], float] = time.monotonic,
        switch_length: int = 0,
        drafting: DraftNeeds = NO_DRAFTING,
        listeners: Listeners = NO_LISTENERS,
    ) -> None:
        """``switch_length`` is the model's: see CausalModel."""
        self.kv = KVManager(num_blocks, config.block_size, config.prefix_caching)
        self.cost = cost
        self.target_version = 0
        self._weights = 0
        """How often the target's weights have changed."""
        self.standstill = Standstill()
        self._listeners = listeners
        self._config = config
        self._max_model_len = max_model_len
        self._switch_length = switch_length or max_model_len
        self._clock = clock
        self._order = QueueOrder(config, cost, clock)
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingRequests(config.priority_step_s)
        self._running: list[Request] = []  # by deadline
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._under_way: deque[tuple[StepPlan, list[Request], Decision | None]] = deque()
        self._ended_slots: list[tuple[int, int]] = []  # since the last plan
        self._ended: list[TokenDelta] = []  # terminal deltas that no step will bring
        self._offline = OfflineShare(config, cost, self._awaits_result)
        self._prompt_planner = PromptPlanner(config, cost, self._waiting, self._offline)
        self.draft_planner = DraftPlanner(config, max_model_len, self._switch_length, self.kv, cost, drafting)
        self._step = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._queries = self._hits = self._preemptions = 0

    # Requests in and out --------------------------------------------------------------------------------------------

    def add(self, message: NewRequest, drafter: str = "", is_held: bool = False, lora: LoadedAdapter = PLAIN) -> None:
        """``drafter`` names the learned drafter of this route alone: it knows nothing of blocks that others filled.
        One that ``is_held`` waits until it is released, while others pass it."""
        sharing = message.tenant if self._config.prefix_cache_scope == "tenant" else ""
        scope = (message.cache_salt, sharing, drafter, lora.key)
        request = Request(message, self._order.deadline(message), scope, is_held, lora)
        if request.length > self._switch_length:
            request.outgrow()
        self._requests[request.request_id] = request
        self._waiting.opened(request, self._running)
        self._waiting.add(request)
        self._listeners.begin(message)

    def abort(self, request_ids: Iterable[int], stopped: bool = False) -> None:
        """Ends requests at once; unknown ids are ignored. Their blocks are free before the next step.

        ``stopped`` tells listeners that the answer is whole.
        """
        for request_id in request_ids:
            if request := self._requests.get(request_id):
                self._end(request, "stop" if stopped else "abort")
                self._ended.append(request.delta(self.target_version, [], "abort"))

    def refuse(self, message: NewRequest, error: str) -> None:
        """Ends a request with an error before it is added."""
        self._ended.append(TokenDelta(request_id=message.request_id, tokens=[], finish_reason="error", error=error))

    def release(self, request_id: int, grammar: object) -> None:
        """A request that was held may begin, if it has not ended; ``grammar`` is kept as long as it."""
        if request := self._requests.get(request_id):
            request.is_held, request.grammar = False, grammar

    def reject(self, request_id: int, error: str) -> None:
        """Ends a request that was held with an error, if it has not ended: what it asks for cannot be computed."""
        if request := self._requests.get(request_id):
            self._end(request, "error")
            self._ended.append(request.delta(self.target_version, [], "error", error=error, is_refused=True))

    @property
    def has_work(self) -> bool:
        return bool(self._ended) or (not self.is_still and not all(each.is_held for each in self._requests.values()))

    @property
    def num_under_way(self) -> int:
        """Planned steps that are not committed yet."""
        return len(self._under_way)

    # Pauses and updates of the target --------------------------------------------------------------------------------

    def pause(self, mode: PauseMode) -> None:
        """See PauseMode; called with no step under way."""
        self.interrupt(mode)
        self.standstill.pause = mode

    def resume(self) -> None:
        self.standstill.pause = None

    @property
    def is_still(self) -> bool:
        """Whether a pause or a sleep lasts in which nothing goes on to its end any more."""
        return self.standstill.holds(self._requests.values())

    def use_target(self, version: int, mode: UpdateMode) -> None:
        """The target computes with other weights from now on; called with no step under way."""
        self.interrupt(mode)
        for request in [each for each in self._running if each.tells_of_prompt]:
            self._requeue(request)  # else what it tells would be of both weights, whatever the mode
        self.target_version, self._weights = version, self._weights + 1
        self.kv.reset()

    def interrupt(self, mode: PauseMode | UpdateMode) -> None:
        """What becomes of open requests at once; those that the mode keeps stay as they are."""
        if mode == "abort":
            self.abort(list(self._requests))
        elif mode == "recompute":
            for request in list(self._running):
                self._requeue(request)

    # A step ---------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute for now."""
        if self.is_still:
            return None
        plan = PlanBuilder()
        self._restart_outgrown()
        self._admit(plan)
        prompts = [each for each in self._running if each.is_prompt and not self._awaits_result(each)]
        self._plan_decodes(plan, self._prompt_planner.stand_back(self._running, prompts))
        self._prompt_planner.plan(plan, prompts)
        if not plan.requests:
            return None
        for request in plan.requests:
            self.kv.publish(request)
        self._step += 1
        ended, self._ended_slots = self._ended_slots, []
        wants = self.draft_planner.wants(plan, prompts_wait(self._running, plan))
        step = plan.build(self._step, ended, *wants)
        self._under_way.append((step, plan.requests, plan.decision))
        return step

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Takes the result of the oldest planned step; returns what its requests have to tell."""
        planned, requests, decision = self._under_way.popleft()
        assert planned is plan, "steps are committed in the order they were planned"
        self.draft_planner.observe(plan, decision, result)
        self.cost.observe(plan.work_with(result.drafted), result.seconds)
        deltas = self.take_ended()
        each = result.seconds / max(1, plan.num_tokens) if self._waiting.is_shared else 0.0
        for row, request in enumerate(requests):
            if each and plan.samples[row]:  # prompts were charged when they were admitted
                self._waiting.charge(request, each * (1 + result.drafted[row]))
            if plan.samples[row]:
                request.in_flight -= 1 + plan.drafts[row]
                request.unsure -= plan.drafts[row]
            if request.finished:
                continue
            if row in result.prompt_logprobs:
                request.prompt_logprobs += result.prompt_logprobs[row]
            if row in result.pooled:
                request.pool(result.pooled[row])
            if row in result.errors:
                self._end(request, "error")
                error, is_refused = result.errors[row], row in result.refused
                deltas.append(request.delta(self.target_version, [], "error", error=error, is_refused=is_refused))
            elif plan.samples[row]:
                self.draft_planner.take_back(request, row, plan, result)
                deltas.append(self._take_tokens(request, row, result))
        return deltas

    def fail(self, error: str) -> list[TokenDelta]:
        """The oldest planned step failed, and the runner has forgotten all rows: nothing that was computed counts.

        The requests of that step end; the others go back to the queue. Returns what they have to tell.
        """
        _, failed, _ = self._under_way.popleft()
        self._under_way.clear()
        for request in list(self._running):
            self._preempt(request, None)
        for request in self._requests.values():
            request.in_flight = request.unsure = 0
        deltas = self.take_ended()
        for request in failed:
            if not request.finished:
                self._end(request, "error")
                deltas.append(request.delta(self.target_version, [], "error", error=error))
        self._ended_slots.clear()
        self.kv.reset()
        return deltas

    def take_ended(self) -> list[TokenDelta]:
        """Terminal deltas of requests that were aborted since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def stats(self, **step: Any) -> EngineStats:
        """A snapshot; ``step`` holds the fields that describe the last step."""
        pool = self.kv.pool
        return EngineStats(
            step=self._step,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            preemptions=self._preemptions,
            speculation_steps=dict(self.draft_planner.reasons),
            target_version=self.target_version,
            is_paused=self.standstill.pause is not None,
            is_still=self.is_still,
            released=self.standstill.released,
            **step,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks, slots or queues do not add up."""
        self.kv.pool.check([request.blocks for request in self._requests.values()])
        assert len(self._running) + len(self._waiting) == len(self._requests), "a request is in no queue, or in two"
        check_rows(self._running, self._waiting, self._free_slots, self._config.max_running, self._config.block_size)

    # Planning -------------------------------------------------------------------------------------------------------

    def _restart_outgrown(self) -> None:
        """Requests that have become longer than the switch length are computed again, from their first position on."""
        for request in [*self._running, *self._waiting] if self._switch_length < self._max_model_len else ():
            if request.length <= self._switch_length or request.outgrown or self._awaits_result(request):
                continue
            if request.slot >= 0:
                self._requeue(request)
            request.outgrow()

    def _admit(self, plan: PlanBuilder) -> None:
        """Moves waiting requests to running ones while there is room, each in its turn."""
        for request in self._waiting.in_turn():
            if request.in_flight:
                continue  # preempted with tokens under way, which will come with the next commit
            if request.is_held or (self.standstill.pause and not request.has_begun):
                continue
            request.take_root(self._weights)
            if self._waiting.prompts_before(request, self._running) >= self._config.max_step_tokens:
                return  # more urgent ones leave no room in the next step
            while True:
                spare = len(self._running)
                admission = self.kv.admit(request, spare) if self._free_slots else Wait.BLOCKS
                if admission is not Wait.BLOCKS or not self._preempt_for(request):
                    break
            if admission is Wait.PREFIX:
                continue
            if isinstance(admission, Wait):
                return  # nobody overtakes the first in line
            self._start(request, admission, plan)

    def _start(self, request: Request, admission: Admission, plan: PlanBuilder) -> None:
        self._waiting.remove(request)
        insort(self._running, request, key=_deadline)
        request.slot = self._free_slots.pop()
        request.num_computed = admission.num_cached
        request.begin_again()
        self._waiting.charge_prompt(request, self.cost)
        if not request.scheduled_at:
            request.scheduled_at = self._clock()
            request.num_cached = admission.num_cached
            self._prompt_tokens += request.num_prompt
        self._queries += len(request.tokens)
        self._hits += admission.num_cached
        plan.new.append(request.new_row())
        plan.blocks.append((request.slot, 0, list(request.blocks)))
        plan.copies.extend(admission.copies)

    def _plan_decodes(self, plan: PlanBuilder, standing_back: Set[Request]) -> None:
        """One token for every other stream; a stream without room for it pushes out the least urgent request."""
        for request in self._offline.decodes([each for each in self._running if each not in standing_back], plan):
            if request.slot < 0 or request.length - request.num_computed != 1 or self._awaits_result(request):
                continue
            while (grown := self.kv.grow(request, request.length)) is None:
                if request.unsure:
                    break  # the room may not be needed, and then nobody has to go
                victim = self._running[-1]
                self._preempt(victim, plan)
                if victim is request:
                    break
            else:
                plan.map_grown(request, grown)
                plan.add(request, 1)
        is_asked = any(any(step.wanted) for step, _, _ in self._under_way)
        self.draft_planner.plan(plan, prompts_wait(self._running, plan), is_asked)

    def _awaits_result(self, request: Request) -> bool:
        return request.awaits_result(self._max_model_len, self._switch_length)

    def _preempt_for(self, request: Request) -> bool:
        """Makes room by pushing out a running request of lower priority and later deadline, if there is one."""
        if not self._running:
            return False
        victim = self._running[-1]
        if is_weaker := victim.rank > request.rank and victim.deadline > request.deadline:
            self._preempt(victim, None)
        return is_weaker

    def _preempt(self, request: Request, plan: PlanBuilder | None) -> None:
        """Back to the queue; its blocks go, what they held is recomputed or found in the prefix cache."""
        if plan is not None:
            plan.remove_row(request.slot)
        self._preemptions += 1
        request.num_preemptions += 1
        self._requeue(request)

    def _requeue(self, request: Request) -> None:
        self._leave_row(request)
        request.num_computed = 0
        self._waiting.add(request)

    # Results --------------------------------------------------------------------------------------------------------

    def _take_tokens(self, request: Request, row: int, result: StepResult) -> TokenDelta:
        """Appends what a step sampled, up to where the request ends."""
        sampled, logprobs = result.tokens[row], result.logprobs.get(row)
        first_draft = result.first_drafts.get(row, NO_DRAFT)
        request.drafter_version = first_draft.version or request.drafter_version
        if request.message.params.max_tokens == 0:
            self._end(request, "length")
            return request.delta(self.target_version, [], "length")
        taken, finish, stop_token = request.take(sampled, self._max_model_len)
        if finish is not None:
            self._end(request, finish)
        elif request.slot >= 0:
            self.kv.publish(request)
        self._generation_tokens += taken
        return request.delta(
            self.target_version,
            sampled[:taken],
            finish,
            stop_token,
            logprobs[:taken] if logprobs else None,
            num_drafted=result.drafted[row],
            num_accepted=min(taken, len(sampled) - 1),
            first_draft=first_draft,
            is_shortened=finish == "stop" and row in result.shortened,
        )

    def _end(self, request: Request, reason: FinishReason) -> None:
        del self._requests[request.request_id]
        request.finished = True
        self._waiting.ended(request)
        if reason in ("stop", "length"):
            self._order.ended(request.message, request.num_output)
        if request.slot >= 0:
            self._ended_slots.append((request.slot, len(request.tokens)))
            self._leave_row(request)
        else:
            self._waiting.remove(request)
        version, drafter_version = self.target_version, request.drafter_version
        self._listeners.finish(EndedRequest(request.message, request.tokens, reason, version, drafter_version))

    def _leave_row(self, request: Request) -> None:
        self.kv.free(request)
        self._running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1
        request.offer = ()
