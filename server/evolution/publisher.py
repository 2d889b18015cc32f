"""Makes the engine draft with what the registry says, and lets new versions prove themselves first."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Event, RegistryError, Version
from slipstream.engine.errors import EngineDiedError, MisfitError, ModelError, SlipstreamError, SupersededError
from slipstream.server.canary import Canary
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.service import CANARY_ROUTE, SHARED_ROUTE, Service

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
RETRY_SECONDS = 30.0
"""After which a version is loaded again where loading has failed without the engine saying that it is bad."""
TRIED = "trial"
"""Metric of a version whose trial is over: 1 if it stayed, 0 if it did not."""
OVERFULL = 3
"""Candidates kept per route that are older than the newest; training makes more."""


@dataclass(slots=True)
class Trial:
    """A new version and the one it replaces, both on real requests.

    A canary runs beside the live version, on the canary's route. A version that somebody made live without a trial is
    on the shared route already: then its predecessor takes the canary's route.
    """

    new: int
    old: int
    is_live: bool
    canary: Canary

    @property
    def beside(self) -> int:
        """The version on the canary's route."""
        return self.old if self.is_live else self.new

    def route(self, request_id: int) -> str:
        return SHARED_ROUTE if self.canary.takes(request_id) == self.is_live else CANARY_ROUTE

    def ended(self, route: str, proposals: int, right: int) -> None:
        version = {SHARED_ROUTE: self.new if self.is_live else self.old, CANARY_ROUTE: self.beside}.get(route)
        if version is not None:
            self.canary.observe(version, proposals, right)


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the registry says should be."""

    routes: dict[str, Version]
    """Live versions."""
    canary: Version | None
    forced: Version | None
    """A live version that nobody tried, and …"""
    predecessor: Version | None
    """… the one it replaced."""
    candidates: Sequence[Version]
    """The newest that passed the gate and was not tried, of every route that may try one now."""


class Publisher:
    """The registry decides what is live; this asks it twice a second, since commands of other processes change it.

    Versions are loaded while it goes on asking: what is decided meanwhile takes the place of what was decided before.
    """

    def __init__(self, service: Service, registry: Registry, config: EvolutionConfig) -> None:
        self._service = service
        self._registry = registry
        self._config = config
        self._refused: dict[str, int] = {}
        """Versions that the engine would not load, by route."""
        self._failed: dict[str, float] = {}
        """Routes on which loading failed, which says nothing about the version; and when it is tried again."""
        self._loaded: dict[str, int] = {}
        """Versions of the registry that the engine has; a head of another origin may have any number, or 0: none."""
        self._coming: dict[str, tuple[int, asyncio.Task[None]]] = {}
        """Versions that it is loading, by route."""
        self._poked = asyncio.Event()
        self.error: str | None = None
        """Why the registry cannot be used at the moment."""
        self.trial: Trial | None = None
        self.swaps: int = 0
        self.failures: int = 0
        self.last_swap: dict[str, float] = {}
        """What the engine said of the last swap."""
        self.decisions: dict[str, int] = {"promote": 0, "roll_back": 0}
        self.wanted: dict[str, Version] = {}

    async def run(self) -> None:
        """Until cancelled. Nothing that goes wrong here may end it."""
        while True:
            self._poked.clear()
            try:
                if self._service.engine.failure is None:
                    await self.look()
                    self.error = None
            except EngineDiedError:
                pass  # the next one is asked when it is there
            except (SlipstreamError, OSError) as error:
                if str(error) != self.error:
                    logger.error("drafter registry: %s", error)
                self.error = str(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), LOOK_SECONDS)

    def poke(self) -> None:
        """Something has been decided in this process: look now."""
        self._poked.set()

    async def close(self) -> None:
        """Once ``run`` has ended."""
        tasks = [task for _, task in self._coming.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def engine_started(self) -> None:
        """Another engine process has what its configuration says, and nothing of what the last one had loaded."""
        self._loaded.clear()
        self._coming.clear()
        self._failed.clear()

    async def look(self) -> None:
        """Brings trials and the engine in line with the registry."""
        wish = await asyncio.to_thread(self._read)
        if self.trial is not None and self.trial.canary.decision != "continue":
            await asyncio.to_thread(self._decide, self.trial)
            self.trial = None
            wish = await asyncio.to_thread(self._read)
        for candidate in wish.candidates:
            await asyncio.to_thread(self._admit, candidate, wish)
        if wish.candidates:
            wish = await asyncio.to_thread(self._read)
        await self._follow(wish)

    def route(self, request_id: int) -> str:
        """Of a request that no route of its own takes."""
        trial = self.trial
        if trial is None or self._loaded.get(CANARY_ROUTE) != trial.beside:
            return SHARED_ROUTE
        return trial.route(request_id)

    def _read(self) -> _Wish:
        versions = self._registry.list()
        live, canaries = (
            {version.route: version for version in versions if version.state == state} for state in ("live", "canary")
        )
        shared, canary = live.get(SHARED_ROUTE), canaries.get(SHARED_ROUTE)
        forced = predecessor = None
        if shared is not None and canary is None and TRIED not in shared.metrics:
            predecessor = self._registry.predecessor(SHARED_ROUTE)
            if predecessor is not None and _was_forced(self._registry.history(shared.version)):
                forced = shared
        pinned = {route for route, version in live.items() if version.pinned}
        waiting = (v for v in versions if v.state == "candidate" and v.route not in pinned)
        candidates = [version for version in waiting if passed_gate(version) and TRIED not in version.metrics]
        newest = {version.route: version for version in sorted(candidates, key=lambda version: version.version)}
        if canary is not None or forced is not None:
            newest.pop(SHARED_ROUTE, None)  # one trial at a time
        return _Wish(live, canary, forced, predecessor if forced else None, list(newest.values()))

    def _admit(self, candidate: Version, wish: _Wish) -> None:
        """The next version on trial; at once live where nothing is."""
        if candidate.route not in wish.routes:
            self._registry.promote(candidate.version, "the first one on its route")
            self._registry.record_metrics(candidate.version, {TRIED: 1})
        elif candidate.route == SHARED_ROUTE:
            self._registry.start_canary(candidate.version, f"on {self._config.canary_share:.0%} of the requests")
        else:
            # Few requests have a route of their own: the gate's verdict on held-out traffic has to do.
            self._registry.promote(candidate.version, "passed the gate")
            self._registry.record_metrics(candidate.version, {TRIED: 1})
        self._registry.prune(OVERFULL, candidate.route, "superseded")

    def _decide(self, trial: Trial) -> None:
        canary = trial.canary
        stays = canary.decision == "promote"
        self.decisions["promote" if stays else "roll_back"] += 1
        before, now = canary.means
        logger.info("drafter version %d: %s, %s", trial.new, canary.decision.replace("_", " "), canary.reason)
        try:
            self._registry.record_metrics(
                trial.new, {TRIED: float(stays), "trial_right": now, "trial_right_before": before}
            )
            if not stays:
                self._registry.roll_back(SHARED_ROUTE, canary.reason, version=trial.new)
            elif not trial.is_live:
                self._registry.promote(trial.new, canary.reason)
        except RegistryError as error:
            # Somebody else decided meanwhile.
            logger.info("drafter version %d: %s", trial.new, error)

    async def _follow(self, wish: _Wish) -> None:
        wanted = dict(wish.routes)
        self._set_trial(wish)
        beside = wish.canary or wish.predecessor
        if beside is not None and self.trial is not None:
            wanted[CANARY_ROUTE] = beside
        self.wanted = wanted
        if SHARED_ROUTE not in self._loaded and self._service.engine_config.drafter == str(self._registry.folder):
            # What the engine has found in the registry: 0, which no version has, if it could use none of it.
            found = self._service.drafter_versions().get(SHARED_ROUTE)
            if found is None:
                return  # it has not said so yet
            self._loaded[SHARED_ROUTE] = found
        for route in {*self._loaded, *self._coming} - set(wanted):
            if self._loaded.pop(route, 0) or route in self._coming:
                self._coming.pop(route, None)
                with contextlib.suppress(ModelError):  # there was nothing: what was coming has been refused
                    await self._service.engine.call("drop_drafter", route=route)
            if route == SHARED_ROUTE:
                self._loaded[route] = 0
        for route, version in sorted(wanted.items()):
            coming, _ = self._coming.get(route, (None, None))
            if version.version == (coming or self._loaded.get(route)):
                continue
            if version.version == self._refused.get(route) or time.monotonic() < self._failed.get(route, 0.0):
                continue
            self._coming[route] = version.version, asyncio.create_task(self._load(route, version))

    def _set_trial(self, wish: _Wish) -> None:
        live = wish.routes.get(SHARED_ROUTE)
        if wish.canary is not None and live is not None:
            new, old, is_live = wish.canary.version, live.version, False
        elif (
            wish.forced is not None
            and wish.predecessor is not None
            and wish.forced.version != self._refused.get(SHARED_ROUTE)  # which drafts for nobody
        ):
            new, old, is_live = wish.forced.version, wish.predecessor.version, True
        else:
            self.trial = None
            return
        if self.trial is None or (self.trial.new, self.trial.old) != (new, old):
            share = self._config.canary_share
            canary = Canary(old, new, 1 - share if is_live else share, max_requests=self._config.canary_requests)
            self.trial = Trial(new, old, is_live, canary)

    async def _load(self, route: str, version: Version) -> None:
        """Nothing that goes wrong here may be lost: nobody waits for it."""
        try:
            await self._swap(route, version)
        except (EngineDiedError, SupersededError):
            pass  # which says nothing about the version; what is wanted is asked for again
        except (SlipstreamError, OSError) as error:
            self.failures += 1
            self._failed[route] = time.monotonic() + RETRY_SECONDS
            logger.error(
                "loading drafter version %d failed; trying again in %g s: %s", version.version, RETRY_SECONDS, error
            )
        finally:
            _, task = self._coming.get(route, (None, None))
            if task is asyncio.current_task():
                del self._coming[route]
                self.poke()

    async def _swap(self, route: str, version: Version) -> None:
        path = str(self._registry.path(version.version))
        engine = self._service.engine
        try:
            self.last_swap = await engine.call("swap_drafter", version=version.version, route=route, path=path)
        except ModelError as error:
            self.failures += 1
            logger.error("drafter version %d cannot serve: %s", version.version, error)
            # A live version that is sound may be right for another server; a trial of it here would never end.
            stays = version.state == "live" and isinstance(error, MisfitError)
            self._refused[route] = version.version
            if version.state in ("canary", "live") and not stays:
                await asyncio.to_thread(self._take_back, version, str(error))
            return
        if engine is not self._service.engine:
            return  # it has ended since
        self.swaps += 1
        self._failed.pop(route, None)
        self._loaded[route] = version.version
        self._refused.pop(route, None)
        logger.info("drafter version %d serves %s", version.version, route or "all requests")

    def _take_back(self, version: Version, why: str) -> None:
        """What the engine refuses is neither live nor on trial, as far as there is something to go back to."""
        try:
            self._registry.roll_back(version.route, f"the engine refused it: {why}", version=version.version)
        except RegistryError as error:
            logger.warning("drafter version %d: %s", version.version, error)


def passed_gate(version: Version) -> bool:
    """Whether it was shown to be better than what was live then."""
    return (version.metrics.get("least_ratio") or version.manifest.gate.get("least_ratio", 0.0)) > 1


def _was_forced(history: Sequence[Event]) -> bool:
    """Whether it went live without having been a canary."""
    return bool(history) and all(event.after != "canary" for event in history)
