"""Decides what should draft: admits what passed the gate, judges trials, takes back what an engine refuses.

Of all servers that use a registry one is in control, and decides; the others follow. `slipstream drafter` and the admin
API decide for people, whoever is in control.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.drafter.registry.control import Control, NotInControlError
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Event, RegistryError, Version
from slipstream.drafter.routes import CANARY_ROUTE, SHARED_ROUTE
from slipstream.server.evolution.canary import Canary
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.evolution.wish import Outcome, Refusal, Trial, Wish

logger = logging.getLogger(__name__)
TRIED = "trial"
"""Metric of a version whose trial is over: 1 if it stayed, 0 if it did not."""
OVERFULL = 3
"""Candidates kept per route that are older than the newest; training makes more."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What the registry says."""

    live: dict[str, Version]
    """The live version of each route."""
    canary: Version | None
    forced: Version | None
    """A live version that nobody tried, and …"""
    predecessor: Version | None
    """… the one it replaced."""
    candidates: Sequence[Version]
    """The newest that passed the gate and was not tried, of every route that may try one now."""


class Controller:
    """Asked for its wish twice a second, since commands of other processes change the registry, too."""

    def __init__(self, registry: Registry, config: EvolutionConfig) -> None:
        self._registry = registry
        self._config = config
        self._control = Control(registry)
        self._refused: dict[str, int] = {}
        """What an engine would not load, by route."""
        self.judge: Canary | None = None
        """Judge of the trial under way."""
        self.trial: Trial | None = None
        self.decisions: dict[str, int] = {"promote": 0, "roll_back": 0}
        self.live: dict[str, Version] = {}

    @property
    def in_control(self) -> bool:
        return self._control.registry is not None

    async def wish(self) -> Wish:
        """What should draft now, after deciding what there is to decide."""
        return await asyncio.to_thread(self._look)

    def count(self, outcome: Outcome) -> bool:
        """Counts a request that has ended; whether the trial is decided now."""
        judge = self.judge  # which another thread may end meanwhile
        return judge is not None and judge.observe(outcome.version, outcome.proposals, outcome.right) != "continue"

    async def refused(self, refusal: Refusal) -> None:
        """What the engine refuses is neither live nor on trial, as far as there is something to go back to."""
        self._refused[refusal.route] = refusal.version
        await asyncio.to_thread(self._take_back, refusal)

    def close(self) -> None:
        """Another server may decide."""
        self._control.release()

    def _look(self) -> Wish:
        registry = self._control.take()
        found = self._read()
        if registry is not None:
            try:
                found = self._decide(registry, found)
            except NotInControlError as error:
                logger.warning("%s", error)
                self._control.lose()
        self._set_trial(found if self.in_control else None)
        self.live = found.live
        routes = {route: version.version for route, version in found.live.items()}
        if self.trial is not None:
            routes[CANARY_ROUTE] = self.trial.beside
        return Wish(self._control.epoch, routes, self.trial)

    def _read(self) -> _Found:
        versions = self._registry.list()
        live, canaries = (
            {version.route: version for version in versions if version.state == state} for state in ("live", "canary")
        )
        shared, canary = live.get(SHARED_ROUTE), canaries.get(SHARED_ROUTE)
        forced = predecessor = None
        if shared is not None and canary is None and TRIED not in shared.metrics:
            predecessor = self._registry.predecessor(SHARED_ROUTE)
            # There is no trial beside a version that no engine loads.
            can_compare = predecessor is not None and predecessor.version != self._refused.get(CANARY_ROUTE)
            if can_compare and _was_forced(self._registry.history(shared.version)):
                forced = shared
        pinned = {route for route, version in live.items() if version.pinned}
        waiting = (v for v in versions if v.state == "candidate" and v.route not in pinned)
        candidates = [version for version in waiting if passed_gate(version) and TRIED not in version.metrics]
        newest = {version.route: version for version in sorted(candidates, key=lambda version: version.version)}
        if canary is not None and shared is None:
            newest[SHARED_ROUTE] = canary  # what it was on trial against is gone, and nothing drafts
        elif canary is not None or forced is not None:
            newest.pop(SHARED_ROUTE, None)  # one trial at a time
        return _Found(live, canary, forced, predecessor if forced else None, list(newest.values()))

    def _decide(self, registry: Registry, found: _Found) -> _Found:
        """Ends a trial that has shown enough, then admits what waits; what the registry says after that."""
        if self.trial is not None and self.judge is not None and self.judge.decision != "continue":
            self._end_trial(registry, self.trial, self.judge)
            found = self._read()
        for candidate in found.candidates:
            self._admit(registry, candidate, found)
        return self._read() if found.candidates else found

    def _admit(self, registry: Registry, candidate: Version, found: _Found) -> None:
        """The next version on trial; at once live where nothing is."""
        if candidate.route not in found.live:
            registry.promote(candidate.version, "the first one on its route")
            registry.record_metrics(candidate.version, {TRIED: 1})
        elif candidate.route == SHARED_ROUTE:
            registry.start_canary(candidate.version, f"on {self._config.canary_share:.0%} of the requests")
        else:
            # Few requests have a route of their own: the gate's verdict on held-out traffic has to do.
            registry.promote(candidate.version, "passed the gate")
            registry.record_metrics(candidate.version, {TRIED: 1})
        registry.prune(OVERFULL, candidate.route, "superseded")

    def _end_trial(self, registry: Registry, trial: Trial, judge: Canary) -> None:
        self.trial = self.judge = None
        stays = judge.decision == "promote"
        self.decisions["promote" if stays else "roll_back"] += 1
        before, now = judge.means
        logger.info("drafter version %d: %s, %s", trial.new, judge.decision.replace("_", " "), judge.reason)
        try:
            metrics = {TRIED: float(stays), "trial_right": now, "trial_right_before": before}
            registry.record_metrics(trial.new, metrics)
            if not stays:
                registry.roll_back(SHARED_ROUTE, judge.reason, version=trial.new)
            elif not trial.is_live:
                registry.promote(trial.new, judge.reason)
        except NotInControlError:
            raise
        except RegistryError as error:
            # Somebody else decided meanwhile.
            logger.info("drafter version %d: %s", trial.new, error)

    def _set_trial(self, found: _Found | None) -> None:
        """Sets the trial; without control there is none: who does not decide counts nothing."""
        live = found.live.get(SHARED_ROUTE) if found is not None else None
        share = self._config.canary_share
        if found is not None and found.canary is not None and live is not None:
            trial = Trial(found.canary.version, live.version, is_live=False, share=share)
        elif (
            found is not None
            and found.forced is not None
            and found.predecessor is not None
            and found.forced.version != self._refused.get(SHARED_ROUTE)  # which drafts for nobody
        ):
            trial = Trial(found.forced.version, found.predecessor.version, is_live=True, share=1 - share)
        else:
            self.trial = self.judge = None
            return
        if trial != self.trial:
            self.trial = trial
            self.judge = Canary(trial.old, trial.new, max_requests=self._config.canary_requests)

    def _take_back(self, refusal: Refusal) -> None:
        registry = self._control.registry
        if registry is None:
            return
        try:
            version = registry.get(refusal.version)
            why = f"the engine refused it: {refusal.reason}"
            # A version that is sound may be right for another server; a trial of it here would never end.
            if refusal.is_misfit and version.state == "canary":
                registry.retire(version.version, why)
            elif not refusal.is_misfit and version.state in ("canary", "live"):
                registry.roll_back(version.route, why, version=version.version)
        except RegistryError as error:
            logger.warning("drafter version %d: %s", refusal.version, error)


def passed_gate(version: Version) -> bool:
    """Whether it was shown to be better than what was live then."""
    return (version.metrics.get("least_ratio") or version.manifest.gate.get("least_ratio", 0.0)) > 1


def _was_forced(history: Sequence[Event]) -> bool:
    """Whether it went live without having been a canary."""
    return bool(history) and all(event.after != "canary" for event in history)
