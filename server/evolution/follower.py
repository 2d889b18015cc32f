"""Makes the engine draft with what the controller wishes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from slipstream.drafter.routes import CANARY_ROUTE, SHARED_ROUTE
from slipstream.engine.errors import EngineDiedError, MisfitError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.operations import DropDrafter, SwapDrafter, SwapReport
from slipstream.server.evolution.served import Served
from slipstream.server.evolution.wish import Outcome, Refusal, Trial, Wish

logger = logging.getLogger(__name__)
RETRY_SECONDS = 30.0
"""Time after which a version is loaded again where loading has failed without the engine saying that it is bad."""


class Follower:
    """Versions are loaded while further wishes come: what is decided meanwhile takes the place of what was decided
    before.
    """

    def __init__(
        self,
        service: Served,
        registry: Path,
        folder_of: Callable[[int], Path],
        refused: Callable[[Refusal], Awaitable[None]],
        loaded: Callable[[], None],
    ) -> None:
        """
        Args:
            registry: engines that are started with it as their drafter begin with its live version.
            folder_of: where a version's files are on this machine.
            refused: tells the controller what the engine would not load.
            loaded: called whenever loading a version has ended, well or not.
        """
        self._service = service
        self._registry = str(registry)
        self._folder_of, self._tell_refusal, self._tell_loaded = folder_of, refused, loaded
        self._epoch = 0
        self._refused: dict[str, int] = {}
        """Versions that the engine would not load, by route."""
        self._failed: dict[str, float] = {}
        """Routes on which loading failed, which says nothing about the version; and when it is tried again."""
        self._loaded: dict[str, int] = {}
        """Versions of the registry that the engine has; a head of another origin may have any number, or 0: none."""
        self._coming: dict[str, tuple[int, asyncio.Task[None]]] = {}
        """Versions that it is loading, by route."""
        self.trial: Trial | None = None
        self.swaps: int = 0
        self.failures: int = 0
        self.last_swap: SwapReport | None = None
        """What the engine said of the last swap."""

    async def follow(self, wish: Wish) -> None:
        if wish.epoch < self._epoch:
            logger.warning("ignored what a controller wishes that is no longer in control (epoch %d)", wish.epoch)
            return
        self._epoch = wish.epoch
        self.trial = wish.trial
        if SHARED_ROUTE not in self._loaded and self._service.engine_config.drafter == self._registry:
            # What the engine has found in the registry: 0, which no version has, if it could use none of it.
            found = self._service.drafter_versions().get(SHARED_ROUTE)
            if found is None:
                return  # it has not said so yet
            self._loaded[SHARED_ROUTE] = found
        for route in {*self._loaded, *self._coming} - set(wish.routes):
            if self._loaded.pop(route, 0) or route in self._coming:
                self._coming.pop(route, None)
                with contextlib.suppress(ModelError):  # there was nothing: what was coming has been refused
                    await self._service.engine.call(DropDrafter(route))
            if route == SHARED_ROUTE:
                self._loaded[route] = 0
        for route, version in sorted(wish.routes.items()):
            coming, _ = self._coming.get(route, (None, None))
            if version == (coming or self._loaded.get(route)):
                continue
            if version == self._refused.get(route) or time.monotonic() < self._failed.get(route, 0.0):
                continue
            self._coming[route] = version, asyncio.create_task(self._load(route, version))

    def route(self, request_id: int) -> str:
        """The route of a request that has none of its own."""
        trial = self.trial
        if trial is None or not all(self._drafts(trial, route) for route in (SHARED_ROUTE, CANARY_ROUTE)):
            return SHARED_ROUTE
        return trial.route(request_id)

    def outcome(self, route: str, proposals: int, right: int) -> Outcome | None:
        """What a request that has ended says about the trial, if there is one and it took part."""
        if self.trial is None or not self._drafts(self.trial, route):
            return None
        version = self.trial.version(route)
        return None if version is None else Outcome(version, proposals, right)

    def _drafts(self, trial: Trial, route: str) -> bool:
        """Whether a route has the version that a trial counts there: it may still be read, or not be to be had now."""
        return self._loaded.get(route) == trial.version(route)

    def engine_started(self) -> None:
        """Another engine process has what its configuration says, and nothing of what the last one had loaded."""
        self._loaded.clear()
        self._coming.clear()
        self._failed.clear()

    async def close(self) -> None:
        """Once no more wishes come."""
        tasks = [task for _, task in self._coming.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _load(self, route: str, version: int) -> None:
        """Nothing that goes wrong here may be lost: nobody waits for it."""
        try:
            await self._swap(route, version)
        except (EngineDiedError, SupersededError):
            pass  # which says nothing about the version; what is wanted is asked for again
        except (SlipstreamError, OSError) as error:
            self.failures += 1
            self._failed[route] = time.monotonic() + RETRY_SECONDS
            logger.error("loading drafter version %d failed; trying again in %g s: %s", version, RETRY_SECONDS, error)
        finally:
            _, task = self._coming.get(route, (None, None))
            if task is asyncio.current_task():
                del self._coming[route]
                self._tell_loaded()

    async def _swap(self, route: str, version: int) -> None:
        engine, path = self._service.engine, str(self._folder_of(version))
        try:
            done = await engine.call(SwapDrafter(version, route, path))
        except ModelError as error:
            self.failures += 1
            logger.error("drafter version %d cannot serve: %s", version, error)
            self._refused[route] = version
            await self._tell_refusal(Refusal(version, route, str(error), isinstance(error, MisfitError)))
            return
        if engine is not self._service.engine:
            return  # it has ended since
        self.last_swap = done
        self.swaps += 1
        self._failed.pop(route, None)
        self._loaded[route] = version
        self._refused.pop(route, None)
        logger.info("drafter version %d serves %s", version, route or "all requests")
