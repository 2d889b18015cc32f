"""What all routes share: the engine, the text side of the model, and whether requests are taken at the moment."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slipstream.drafter.routes import ADAPTER_ROUTE, DOMAIN_ROUTE, SHARED_ROUTE, TENANT_ROUTE
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.checkpoint import locate
from slipstream.engine.checkpoint.gguf_file import PART
from slipstream.engine.config import EngineConfig
from slipstream.engine.handle import EngineHandle, RequestStream
from slipstream.engine.memory import trim
from slipstream.engine.messages import NewRequest
from slipstream.engine.operations import UseVocabulary
from slipstream.engine.supervisor import EngineSupervisor, Restarts
from slipstream.server.access.account import Account
from slipstream.server.access.admission import Admission
from slipstream.server.access.gate import key_ring
from slipstream.server.adapters import Adapters
from slipstream.server.companions import Companions
from slipstream.server.config import ServerConfig
from slipstream.server.errors import UnavailableError
from slipstream.server.evolution.metrics import EvolutionCollector
from slipstream.server.evolution.observer import Observer
from slipstream.server.http.held import HeldBytes
from slipstream.server.preparing.prepared import Limits
from slipstream.server.preparing.text_model import TextModel, load_text_model
from slipstream.server.preparing.text_work import TextWork
from slipstream.server.rollout.control import Control
from slipstream.server.telemetry.disks import Disks
from slipstream.server.telemetry.metrics import PREFIX, Metrics
from slipstream.server.telemetry.sequence_metrics import SequenceMetrics
from slipstream.server.tracing import Tracing

if TYPE_CHECKING:
    from slipstream.server.evolution.evolution import Evolution

RETRY_LOADING_S = 2
RETRY_DRAINING_S = 5
OBSERVE_SECONDS = 1.0
KEYS_SECONDS = 2.0
BODIES_HELD = 4
"""How many of the largest bodies may be in memory at the same time."""
MAX_ANSWERS_HELD = 32 * 2**20
"""Bytes of large answers that clients have not read yet."""


StartEngine = Callable[[EngineConfig, TrafficConfig, ServerConfig, EngineHandle | None], Awaitable[EngineHandle]]
"""Starts an engine with everything plugged in; the last argument is the one that it replaces."""


class Service:
    """Serves one model. ``load`` makes it ready, ``drain`` and ``close`` end it."""

    def __init__(
        self,
        config: ServerConfig,
        engine_config: EngineConfig,
        traffic: TrafficConfig,
        start_engine: StartEngine,
    ) -> None:
        """Raises ModelError if there is no such model, ConfigError for what options name and cannot be used."""
        self.config = config
        self.engine_config = engine_config
        self.traffic = traffic
        self.model_names = config.served_model_name or (default_model_name(locate(engine_config.model)),)
        self.metrics = Metrics(self.model_names[0], config.metrics_alias)
        self.tracing = Tracing(config.traces, self.model_names[0]) if config.traces else None
        self._evolution_metrics = EvolutionCollector(PREFIX, self.model_names[0])
        self.metrics.registry.register(self._evolution_metrics)
        self._disks = Disks(PREFIX, self.model_names[0])
        self.metrics.registry.register(self._disks)
        self.keys = key_ring(config)
        self.admission = Admission(
            engine_config.max_running + config.max_queued_requests,
            config.max_queued_tokens,
            lambda: self.engine.num_open,
            self.metrics,
        )
        self.created = int(time.time())
        self.began = time.monotonic()
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.num_responding = 0
        """Responses under way that a shutdown waits for: those of the generating routes, and large ones."""
        self.evolution: Evolution | None = None
        """Drafter evolution, where there is a registry."""
        self.companions = Companions()
        self.observer = Observer()
        self.supervisor = EngineSupervisor(
            self._start_engine,
            Restarts(config.engine_restarts, config.engine_restart_window_s),
            config.engine_hang_s,
            self._engine_started,
            lambda: self.control.is_paused_for_good,
        )
        self.control = Control(self)
        """Pauses, memory and weights, for whoever trains the model."""
        self.adapters = Adapters(self.control, self.model_names, config.lora_folders, config.max_loras, PREFIX)
        self.metrics.registry.register(self.adapters)
        self._start = start_engine
        self._watching: list[asyncio.Task[None]] = []
        self._supervising: asyncio.Task[None] | None = None
        self._text: TextModel | None = None
        self._work: TextWork | None = None
        self._busy_since = 0.0
        self.bodies = HeldBytes(BODIES_HELD * config.max_body_bytes, "bodies of requests")
        self.answers = HeldBytes(MAX_ANSWERS_HELD, "answers that are not read")

    async def load(self) -> None:
        """Starts the engine process and reads the tokenizer at the same time.

        Raises:
            ModelError, ConfigError: the user can mend it.
            EngineDiedError: the engine process ended for another reason.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._load_text())
                group.create_task(self.supervisor.start())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        self.text.fit(self.engine.ready.vocab_size)
        await self._tell_vocabulary(self.engine)
        await self.adapters.begin(self.engine)
        self._work = self._make_work()
        self._watching = [asyncio.create_task(self._observe()), asyncio.create_task(self._disks.watch(self._folders()))]
        if self.keys.watches:
            self._watching.append(asyncio.create_task(self._watch_keys()))
        if self.evolution is not None:
            await self.evolution.start()
            self._evolution_metrics.evolution = self.evolution
        trim()  # a tokenizer is read at several times its size
        if self.phase == "loading":
            self.phase = "ready"
            self.companions.start()

    async def _load_text(self) -> None:
        self._text = await asyncio.to_thread(load_text_model, self.engine_config.model, self.config)

    def _make_work(self) -> TextWork:
        ready = self.engine.ready
        limits = Limits(
            model_names=tuple(self.model_names),
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            max_prompts=self.config.max_prompts,
            unknown_fields=self.config.unknown_fields,
            tool_call_parser=self.config.tool_call_parser,
            reasoning_parser=self.config.reasoning_parser,
            request_templates="elsewhere" if self.config.trust_request_chat_template else "refused",
        )
        return TextWork(self.engine_config.model, self.config, limits, self.text)

    async def keep_running(self) -> None:
        """Once it is loaded: replaces engines that die or hang, until cancelled or drained.

        Raises EngineLostError when it gives up.
        """
        self._supervising = asyncio.create_task(self.supervisor.run())
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervising

    async def _start_engine(self, before: EngineHandle | None) -> EngineHandle:
        if before is not None and self.evolution is not None:
            self.engine_config = await asyncio.to_thread(self.evolution.with_live_version, self.engine_config)
        engine = await self._start(self.engine_config, self.traffic, self.config, before)
        if before is not None:
            await self._tell_vocabulary(engine)
            await self.adapters.load_again(engine)
        return engine

    async def _tell_vocabulary(self, engine: EngineHandle) -> None:
        tokenizer = self.text.tokenizer
        tokens = await asyncio.to_thread(tokenizer.all_bytes)
        await engine.call(UseVocabulary(tokens, sorted(tokenizer.special_ids)))

    def _engine_started(self, engine: EngineHandle) -> None:
        self.metrics.attach(engine, lambda: self.ready()[0] == 200, lambda: self.stalled_s)
        if self.evolution is not None:
            self.evolution.follower.engine_started()

    def _folders(self) -> dict[str, Path]:
        """What grows on disks while the server runs."""
        folders = {}
        if self.traffic.traffic_log != "off" and self.traffic.traffic_folder is not None:
            folders["traffic"] = Path(self.traffic.traffic_folder)
        if self.evolution is not None:
            folders["registry"] = self.evolution.registry.folder
        if self.config.batch_folder is not None:
            folders["batches"] = Path(self.config.batch_folder).expanduser()
        return folders

    async def _observe(self) -> None:
        while True:
            self.observer.look(self.engine.stats, self.drafter_versions().get(SHARED_ROUTE, 0))
            await asyncio.sleep(OBSERVE_SECONDS)

    async def _watch_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_SECONDS)
            await asyncio.to_thread(self.keys.refresh)

    @property
    def is_loaded(self) -> bool:
        """Whether there is an engine to ask about."""
        return self.supervisor.has_started

    @property
    def engine(self) -> EngineHandle:
        return self.supervisor.engine

    @property
    def text(self) -> TextModel:
        assert self._text is not None, "the tokenizer is not loaded"
        return self._text

    @property
    def work(self) -> TextWork:
        assert self._work is not None, "the server is not loaded"
        return self._work

    def require_ready(self) -> None:
        """Raises UnavailableError unless requests are taken."""
        if self.phase == "loading":
            raise UnavailableError("the model is loading", code="loading", retry_after_s=RETRY_LOADING_S)
        if self.phase == "draining":
            raise UnavailableError("the server is shutting down", code="shutting_down", retry_after_s=RETRY_DRAINING_S)
        if self.engine.failure is not None:
            raise self.engine_gone(self.engine.failure)

    def engine_gone(self, reason: str) -> UnavailableError:
        """What those are told whose request came too late for the engine that ended."""
        if self.phase == "draining":
            message, code = "the server shut down before the answer was complete", "shutting_down"
            return UnavailableError(message, code=code, retry_after_s=RETRY_DRAINING_S)
        return UnavailableError(
            reason if self.supervisor.lost else f"{reason}; another one is being started",
            code="engine_failed",
            retry_after_s=self.supervisor.seconds_left,
        )

    def require_model(self, name: str | None) -> str:
        """The name to answer with; requests may leave it out. Raises ModelNotFoundError."""
        return self.adapters.require(name)

    @contextlib.contextmanager
    def responding(self) -> Iterator[None]:
        """Around a response that a shutdown waits for."""
        self.num_responding += 1
        try:
            yield
        finally:
            self.num_responding -= 1

    def submit(self, requests: list[NewRequest], account: Account | None = None) -> list[RequestStream]:
        """Raises UnavailableError, OverloadedError, and ModelNotFoundError for a LoRA that was unloaded meanwhile;
        ``account`` is whose the requests are.
        """
        self.require_ready()
        self.control.require_awake()
        tokens = sum(len(prompt) for prompt in {id(each.prompt): each.prompt for each in requests}.values())
        self.admission.require_room(account or self.keys.anonymous.account, len(requests), tokens)
        for adapter in {request.adapter for request in requests if request.adapter}:
            self.require_model(adapter)
        if self.engine.num_open == 0:
            self._busy_since = time.monotonic()
        return [self.engine.submit(request) for request in requests]

    def drafter_versions(self) -> dict[str, int]:
        """Version of the learned drafter by route, as of the last step."""
        return {route: version for entry in self.engine.stats.drafters for route, version in entry.routes.items()}

    def route(self, request_id: int, tenant: str, domain: str, adapter: str) -> str:
        """Which version of the learned drafter a request uses: that of its LoRA, its tenant's or its domain's own, one
        on trial, or the shared one. Those with a LoRA say nothing about versions for requests without one.
        """
        if adapter:
            return ADAPTER_ROUTE + adapter
        loaded = self.drafter_versions()
        for own in (TENANT_ROUTE + tenant, DOMAIN_ROUTE + domain):
            if own in loaded:
                return own
        return self.evolution.follower.route(request_id) if self.evolution is not None else SHARED_ROUTE

    def ended(self, request: NewRequest, metrics: SequenceMetrics) -> None:
        """A sequence has ended."""
        if request.speculation.mode not in ("auto", "head"):
            return
        if request.route == SHARED_ROUTE:
            version = self.drafter_versions().get(SHARED_ROUTE, 0)
            self.observer.ended(version, self.engine.num_open + 1, metrics)
        if self.evolution is not None:
            self.evolution.ended(request, metrics)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step while sequences are open; 0 while none are."""
        if not self.engine.num_open:
            return 0.0
        return time.monotonic() - max(self.engine.last_step_at, self._busy_since)

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body: does the engine make progress?"""
        if self.phase == "loading" or not self.is_loaded or self._text is None:
            return 503, {"status": "loading", "reason": "the model is loading"}
        if self.engine.failure is not None:
            if self.supervisor.lost or self.phase == "draining":
                return 503, {"status": "failed", "reason": self.engine.failure}
            left = f"in about {self.supervisor.seconds_left} s"
            reason = f"{self.engine.failure}; another one is being started and should be ready {left}"
            return 503, {"status": "restarting", "reason": reason}
        if (stalled_s := self.stalled_s) > self.config.health_stall_s:
            reason = f"{self.engine.num_open} sequences are open and no step has ended for {stalled_s:.0f} s"
            return 503, {"status": "stalled", "reason": reason}
        if self.phase == "draining":
            return 200, {"status": "draining"}
        if released := self.engine.stats.released:
            return 200, {"status": "asleep", "reason": f"it has given back the memory of {' and '.join(released)}"}
        return 200, {"status": "paused" if self.engine.stats.is_paused else "ok"}

    def ready(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body: should requests be sent here?"""
        status, body = self.health()
        if status == 200 and self.phase == "draining":
            return 503, {"status": "draining", "reason": "the server is shutting down"}
        if status == 200 and self.control.refuses:
            return 503, body
        return status, body

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and waits for those under way; False if some are left after the timeout."""
        self.phase = "draining"
        await self.companions.stop()
        await end(self._supervising)  # what is in flight needs the engine there is, and no other
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.num_responding or (self.is_loaded and self.engine.num_open):
                    await asyncio.sleep(0.05)
                return True
        return False

    def kill_engine(self) -> None:
        """Ends the engine process without waiting for the step under way."""
        if self.is_loaded:
            self.engine.kill()

    async def close(self) -> None:
        """Ends the engine process; requests that are still open get their terminal message."""
        self.phase = "draining"
        await self.companions.stop()
        await end(self._supervising)
        for task in self._watching:
            await end(task)
        if self._work is not None:
            await self._work.close()
        if self.evolution is not None:
            await self.evolution.close()
        await self.supervisor.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


async def end(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


def default_model_name(path: Path) -> str:
    if path.suffix.lower() == ".gguf":  # in a cache of the hub, a link to a file that has a number for its name
        part = PART.fullmatch(path.name)
        return path.stem if part is None else part["stem"]
    return path.resolve().name
