"""Drafter evolution in a running server: controller, follower, worker and observer, and what they say to each other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import State
from slipstream.drafter.routes import SHARED_ROUTE
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import EngineDiedError, SlipstreamError
from slipstream.engine.faults import Faults
from slipstream.engine.messages import NewRequest
from slipstream.engine.operations import TellDraftCosts, TellStepCosts
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.evolution.controller import Controller
from slipstream.server.evolution.follower import Follower
from slipstream.server.evolution.observer import Observer
from slipstream.server.evolution.progress import Progress
from slipstream.server.evolution.served import Served
from slipstream.server.evolution.worker import WorkerProcess
from slipstream.server.telemetry.sequence_metrics import SequenceMetrics

logger = logging.getLogger(__name__)
HEAD = "head"
"""What engines call the learned drafter."""
LOOK_SECONDS = 1.0
WISH_SECONDS = 0.5
MACHINE_EVERY = 30
"""Looks between two messages to the worker about what steps cost."""
VERSIONS_SHOWN, EVENTS_SHOWN = 100, 200
"""The newest."""


class Evolution:
    """``start`` once the engine is ready, ``close`` before it ends."""

    def __init__(self, service: Served, config: EvolutionConfig, traffic: TrafficConfig) -> None:
        assert config.registry is not None
        self.config = config
        self.registry = Registry(config.registry, open_now=False)
        self._service = service
        self.controller: Controller = Controller(self.registry, config)
        self.follower: Follower = Follower(
            service, self.registry.folder, self.registry.path, self.controller.refused, self.poke
        )
        self.observer: Observer = service.observer
        self.progress: Progress = Progress()
        self.states: Mapping[State, int] = {}
        """How many versions are in each state."""
        self.worker: WorkerProcess | None = None
        if config.evolve != "off":
            self.worker = WorkerProcess(self._worker_options(traffic), lambda: service.engine.num_open)
            self.worker.on_report.append(self.progress.take)
        self.drifts: int = 0
        self.machine: dict[str, Any] | None = None
        """What steps cost here; None until the worker was told."""
        self.error: str | None = None
        """Why the registry cannot be used at the moment."""
        self._faults = Faults()
        self._poked = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._training: asyncio.Task[None] | None = None

    @property
    def drafts(self) -> bool:
        """Whether the engine runs a learned drafter. One that does not would refuse every version, and try none."""
        return HEAD in self._service.engine.ready.drafters

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        for task in self._tasks:
            await _end(task)
        await self._train(False)
        await self.follower.close()
        self.controller.close()

    def poke(self) -> None:
        """Something has been decided in this process: look now."""
        self._poked.set()

    def with_live_version(self, engine: EngineConfig) -> EngineConfig:
        """An engine that takes over begins with what is live now, not with what the first one began with."""
        with contextlib.suppress(SlipstreamError):
            if engine.speculation != "off" and self.registry.may_serve():
                return replace(engine, drafter=str(self.registry.folder))
        return engine

    def ended(self, request: NewRequest, metrics: SequenceMetrics) -> None:
        """A sequence that may use a learned drafter has ended."""
        outcome = self.follower.outcome(request.route, metrics.proposals, metrics.first_right)
        if outcome is not None and self.controller.count(outcome):
            self.poke()

    @property
    def predicted(self) -> float:
        """Accept length of the live version as the gate saw it; 0 if it was never gated."""
        live = self.controller.live.get(SHARED_ROUTE)
        if live is None:
            return 0.0
        return live.manifest.gate.get("accept_length") or live.metrics.get("accept_length", 0.0)

    @property
    def drift(self) -> float:
        """See ``Observer.drift``."""
        return self.observer.drift(self._expected)

    @property
    def _expected(self) -> float | None:
        """Share of first draft tokens of the live version that were right in the gate; None if that is not known."""
        live = self.controller.live.get(SHARED_ROUTE)
        return None if live is None else live.manifest.gate.get("first_right")

    async def status(self) -> dict[str, Any]:
        """What the dashboard and the admin API show of it."""
        versions: list[Any] = []
        events: list[Any] = []
        problem = self.error
        try:
            versions, events = await asyncio.to_thread(self._read)
        except SlipstreamError as error:
            problem = str(error)
        worker, trial, judge = self.worker, self.controller.trial, self.controller.judge
        return {
            "mode": self.config.evolve,
            "registry": {
                "folder": str(self.registry.folder),
                "error": problem,
                "in_control": self.controller.in_control,
            },
            "options": {
                "first_tokens": self.config.evolve_first_tokens,
                "round_tokens": self.config.evolve_round_tokens,
                "canary_share": self.config.canary_share,
                "canary_requests": self.config.canary_requests,
            },
            "worker": None
            if worker is None
            else {
                "report": worker.report,
                "paused": worker.paused,
                "restarts": worker.restarts,
                **self.progress.status(),
            },
            "machine": self.machine,
            "routes": self._service.drafter_versions(),
            "trial": None
            if trial is None or judge is None
            else {
                "version": trial.new,
                "baseline": trial.old,
                "share": self.config.canary_share,
                "requests": judge.counts,
                "first_guesses_right": judge.means,
            },
            "live": {
                "accept_length": self.observer.accept_length,
                "predicted": self.predicted,
                "drift": self.drift,
                "drifts": self.drifts,
            },
            "swaps": self.follower.swaps,
            "failed_swaps": self.follower.failures,
            "decisions": self.controller.decisions,
            "last_swap": structs.asdict(swap) if (swap := self.follower.last_swap) else {},
            "versions": versions,
            "events": events,
        }

    def _read(self) -> tuple[list[Any], list[Any]]:
        found = self.registry.list(pruned=True)
        # Those in use may be older than many that were tried since.
        shown = [v for i, v in enumerate(found) if i >= len(found) - VERSIONS_SHOWN or v.state in ("live", "canary")]
        versions = [msgspec.to_builtins(version) for version in shown]
        for version in versions:
            del version["manifest"]["head"]
        return versions, [msgspec.to_builtins(event) for event in self.registry.history()[-EVENTS_SHOWN:]]

    async def _follow(self) -> None:
        """Follows the registry until cancelled. Nothing that goes wrong here may end it."""
        while True:
            self._poked.clear()
            try:
                if self._service.engine.failure is None and self.drafts:
                    await self.follower.follow(await self.controller.wish())
                    if self.error is not None:
                        logger.warning("the drafter registry %s can be used again", self.registry.folder)
                    self.error = None
            except EngineDiedError:
                pass  # the next one is asked when it is there
            except Exception as error:
                told, self.error = self.error, str(error) or type(error).__name__
                if self.error != told:
                    is_known = isinstance(error, SlipstreamError | OSError)
                    logger.error(
                        "drafter registry: %s; what drafts now goes on, and the registry is tried again until it is "
                        "mended or put back",
                        self.error,
                        exc_info=None if is_known else error,
                    )
            await self._train(self.controller.in_control)
            if self.worker is not None and self.error is None and not self.controller.in_control:
                self.worker.stand_by("Another server is in control of the registry, and trains.")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WISH_SECONDS):  # wait_for loses a cancellation that comes with a poke
                    await self._poked.wait()

    async def _train(self, wanted: bool) -> None:
        """One worker per registry: that of the server in control."""
        if wanted and self._training is None and self.worker is not None:
            self._training = asyncio.create_task(self.worker.run())
        elif not wanted and self._training is not None:
            training, self._training = self._training, None
            await _end(training)

    async def _look(self) -> None:
        """Tells the worker what it has to know, until cancelled. Nothing that goes wrong here may end it."""
        looks = 0
        while True:
            with contextlib.suppress(SlipstreamError):
                self.states = await asyncio.to_thread(self.registry.count)
            if self.worker is not None:
                try:
                    await self._tell(self.worker, looks)
                except SlipstreamError:
                    pass  # the engine has ended
                except Exception:
                    self._faults.tell("telling the training worker what happens here", "it goes on with what it knows")
                looks += 1
            await asyncio.sleep(LOOK_SECONDS)

    async def _tell(self, worker: WorkerProcess, looks: int) -> None:
        if self.observer.has_drifted(self._expected):
            self.drifts += 1
            logger.info("the traffic has drifted: draft tokens bring %.0f %% of what the gate saw", 100 * self.drift)
            worker.send("train", reason="drift")
        if looks % MACHINE_EVERY == 0:
            await self._tell_machine(worker)

    async def _tell_machine(self, worker: WorkerProcess) -> None:
        """What steps and draft tokens cost, for the gate.

        Where no head has drafted, a draft token is taken to read its weights once, as a step reads the target's.
        """
        engine = self._service.engine
        steps, drafts = await engine.call(TellStepCosts()), (await engine.call(TellDraftCosts())).seconds
        if not drafts and (live := self.controller.live.get(SHARED_ROUTE)) is not None:
            share = live.manifest.weights_bytes / engine.ready.weights_bytes
            drafts = {
                1: [
                    depth * share * steps[min(steps)]
                    for depth in range(1, self._service.engine_config.max_draft_tokens + 1)
                ]
            }
        self.machine = {"step_seconds": steps, "draft_seconds": drafts}
        worker.send("machine", **self.machine, streams=self.observer.use)

    def _worker_options(self, traffic: TrafficConfig) -> dict[str, Any]:
        config, engine = self.config, self._service.engine_config
        assert traffic.traffic_folder is not None
        return {
            "model": engine.model,
            "lineage": engine.target_lineage,
            "quantize": engine.quantize,
            "traffic": str(Path(traffic.traffic_folder).absolute()),
            "registry": str(Path(config.registry or "").absolute()),
            "mode": config.evolve,
            "routes": (SHARED_ROUTE, *config.evolve_route),
            "loss": None if config.evolve_loss == "auto" else config.evolve_loss,
            "first_tokens": config.evolve_first_tokens,
            "round_tokens": config.evolve_round_tokens,
            "threads": config.evolve_threads or None,
            "device": config.evolve_device,
            "engine_device": engine.device,
            "gpu_memory_utilization": engine.gpu_memory_utilization,
        }


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
