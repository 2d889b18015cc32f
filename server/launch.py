"""Puts the parts together and runs them: HTTP first, so that /health answers while the model loads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop

from slipstream.drafter.names import check_drafters
from slipstream.drafter.registry.database import RegistryUnusableError
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine import child
from slipstream.engine.checkpoint import hub
from slipstream.engine.client import EngineClient
from slipstream.engine.config import EngineConfig
from slipstream.engine.early import EarlyProcess
from slipstream.engine.errors import ConfigError
from slipstream.engine.handle import EngineHandle
from slipstream.engine.limits import control_groups
from slipstream.server import ENGINE_PROCESS
from slipstream.server.app import build_app
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.evolution.evolution import Evolution
from slipstream.server.http.protocol import ConnectionLimits, HttpProtocol
from slipstream.server.service import Service, StartEngine
from slipstream.server.telemetry.log import say, set_up_logging

logger = logging.getLogger("slipstream")

KEEP_ALIVE_S = 75
"""Longer than the usual minute of load balancers, which otherwise reuse a connection the moment it is closed."""
FILES_KEPT_BACK = 128
FEW_CONNECTIONS = 256
"""Fewer than a server of one machine may have in an ordinary hour: whoever starts it is told."""
PREFIX = "SLIPSTREAM_"
SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$")
"""What Kubernetes tells a pod of services that are called slipstream or slipstream-something."""
NO_OPTIONS = frozenset({"IMAGE", "COMMIT"})
"""Settings of the compose file, which a server sees too, and of builds."""
FLUSH_TIMEOUT_S = 5
"""How long clients may take to read the last bytes on shutdown."""


async def start_process(
    config: EngineConfig, traffic: TrafficConfig, server: ServerConfig, before: EngineHandle | None
) -> EngineHandle:
    """An engine in a process of its own; raises what EngineClient.start raises."""
    return await EngineClient.start(config, ENGINE_PROCESS, _arguments(traffic, server), before=before)


def starting_with(early: EarlyProcess) -> StartEngine:
    """As start_process, but the first engine runs in a process that is there already."""
    waiting = [early]

    async def start(
        config: EngineConfig, traffic: TrafficConfig, server: ServerConfig, before: EngineHandle | None
    ) -> EngineHandle:
        if not waiting:
            return await start_process(config, traffic, server, before)
        process = waiting.pop()
        process.tell(config, _arguments(traffic, server))
        return await EngineClient.connect(process.channel, process, before)

    return start


def _arguments(traffic: TrafficConfig, server: ServerConfig) -> tuple[str, ...]:
    return server.log_level, server.log_format, msgspec.json.encode(dataclasses.asdict(traffic)).decode()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the order of the shutdown is decided here."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end_connections(self) -> None:
        """Those that clients keep for their next request now, others after the answer under way."""
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpProtocol)
            connection.end_after_answer()

    async def end(self, serving: asyncio.Task[None]) -> None:
        """Ends ``serving``; who has not read the last bytes by then is cut off before uvicorn cancels what answers him,
        which it would show as a failure of the application."""
        self.should_exit = True
        await asyncio.wait({serving}, timeout=FLUSH_TIMEOUT_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await serving


def run(
    config: ServerConfig,
    engine_config: EngineConfig,
    traffic: TrafficConfig,
    evolution: EvolutionConfig,
    early: EarlyProcess,
) -> None:
    """Serves until SIGTERM or Ctrl-C. ``early`` is for the engine.

    Raises:
        ModelError, ConfigError: the user can mend it.
        EngineDiedError: the engine process did not come up.
        EngineLostError: it died later, and another could not be started.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # prompts are encoded in threads of our own
    set_up_logging(config.log_level, config.log_format)
    for name, known in unknown_settings(config, engine_config, traffic, evolution):
        logger.warning("%s in the environment sets no option%s", name, f"; did you mean {known}?" if known else "")
    evolution.check_traffic(traffic)
    config, engine_config = with_local_model(config, engine_config)
    service = make_service(config, engine_config, traffic, evolution, starting_with(early))
    with listen(config.host, config.port) as listener:
        uvloop.run(serve_until_signals(service, listener, early.began))


def unknown_settings(*configs: Any) -> Iterator[tuple[str, str | None]]:
    """Names in the environment that look like options of ours, and of each the option that may be meant.

    A key whose name is misspelt would leave the server open without a word.
    """
    options = [field.name.upper() for config in configs for field in dataclasses.fields(config)]
    for name in sorted(os.environ):
        own = name.removeprefix(PREFIX)
        if own == name or own in options or own in NO_OPTIONS or SERVICE_LINK.match(own):
            continue
        close = difflib.get_close_matches(own, options, 1)
        yield name, PREFIX + close[0] if close else None


def with_local_model(config: ServerConfig, engine: EngineConfig) -> tuple[ServerConfig, EngineConfig]:
    """Fetches models that are named as the hub names them; answers go on to call the model so.

    Raises ModelError, ConfigError.
    """
    models: dict[str, Any] = {}
    for field in ("model", "draft_model"):
        name = getattr(engine, field)
        if name and not Path(name).expanduser().exists() and hub.is_name(name):
            revision = engine.revision if field == "model" else None
            logger.info("fetching %s from the hub, unless it is in the cache", name)
            models[field] = str(hub.fetch(name, revision))
    if engine.revision is not None and "model" not in models:
        raise ConfigError(f"--revision {engine.revision}: --model {engine.model} is no model of the hub")
    if "model" in models and not config.served_model_name:
        config = replace(config, served_model_name=(engine.model,))
    return config, replace(engine, **models)


def make_service(
    config: ServerConfig,
    engine_config: EngineConfig,
    traffic: TrafficConfig,
    evolution: EvolutionConfig,
    start_engine: StartEngine = start_process,
) -> Service:
    """Raises ModelError, ConfigError: the user can mend it."""
    check_training_device(evolution)
    evolution.check_drafters(engine_config)
    engine_config = with_live_drafter(engine_config, evolution)
    check_drafters(engine_config)  # the engine would say the same, but only after seconds of imports
    service = Service(config, engine_config, traffic, start_engine)
    if evolution.registry is not None:
        service.evolution = Evolution(service, evolution, traffic)
    return service


def check_training_device(evolution: EvolutionConfig) -> None:
    """Raises ConfigError if --evolve-device names a GPU that is not there."""
    if evolution.evolve == "off" or not evolution.evolve_device.startswith("cuda"):
        return
    # In a process of its own, because it needs torch.
    command = child.command("slipstream.drafter.training.device", evolution.evolve_device)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--evolve-device: {done.stderr.strip()}")


def with_live_drafter(engine: EngineConfig, evolution: EvolutionConfig) -> EngineConfig:
    """Starts with the registry's live version; else with --drafter, or a head that is still to learn.

    A damaged registry or version keeps no server from starting: the engine takes the next best version, and a registry
    that cannot be used is asked again and again while the server runs.

    Raises ConfigError if --drafter warm has nothing for this model, ModelError if no registry can be created there.
    """
    if evolution.registry is None:
        return engine
    without = engine if engine.drafter is not None else replace(engine, drafter="cold")
    try:
        registry = Registry(evolution.registry)
        live = registry.may_serve()
    except RegistryUnusableError as error:
        logger.error("%s; serving without it until it is mended", error)
        return without
    if engine.speculation == "off":
        return engine
    if not live and engine.drafter == "warm":
        # In a process of its own, because it needs torch. As a version it can be trained on, judged and gone back to.
        command = child.command("slipstream.drafter.warm", engine.model, evolution.registry, engine.target_lineage)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(done.stderr.strip())
        live = registry.may_serve()
    # Of a registry without one, too: then it makes a head that is still to learn and passes for no version of it.
    return replace(engine, drafter=str(registry.folder)) if live or without.drafter == "cold" else without


async def serve_until_signals(service: Service, listener: socket.socket, started: float) -> None:
    """SIGTERM or Ctrl-C ends it when requests have ended, the second one at once."""
    await serve(service, listener, started, *stop_signals(service))


async def serve(
    service: Service, listener: socket.socket, started: float, stop: asyncio.Event, at_once: asyncio.Event
) -> None:
    """Serves until it is told to ``stop``, which waits for requests under way unless it is to end ``at_once``."""
    config = service.config
    settings = uvicorn.Config(
        build_app(service),
        http=partial(HttpProtocol, limits=connection_limits(service)),  # type: ignore[arg-type]  # it calls it
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=2 * FLUSH_TIMEOUT_S,
    )
    http = HttpServer(settings)
    url = address(listener)
    logger.info("loading %s; %s/ready tells when it is done", service.engine_config.model, url)

    serving = asyncio.create_task(http.serve(sockets=[listener]))
    loading = asyncio.create_task(service.load())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({loading, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            said = greeting(service, url, time.monotonic() - started)
            if config.log_format == "json":  # who reads lines of JSON reads both streams, mostly
                logger.info("%s", said)
            else:
                say(said)
            supervising = asyncio.create_task(service.keep_running())
            await asyncio.wait({serving, stopping, supervising}, return_when=asyncio.FIRST_COMPLETED)
            http.end_connections()
            await finish_requests(service, at_once)
            await supervising
    finally:
        stopping.cancel()
        loading.cancel()
        await asyncio.wait({loading})
        await service.close()
        await http.end(serving)


def connection_limits(service: Service) -> ConnectionLimits:
    """Files are kept back for the engine, the registry and the like, so that connections cannot take the last one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    possible = max(1, most - FILES_KEPT_BACK)
    if possible < FEW_CONNECTIONS and (service.config.max_connections or FEW_CONNECTIONS) > possible:
        logger.warning(
            "the limit of open files (ulimit -n) is %d, which leaves room for %d connections: further ones get 503",
            most,
            possible,
        )
    return ConnectionLimits(
        max_connections=min(service.config.max_connections or possible, possible),
        write_timeout_s=service.config.write_timeout_s,
        on_cut=service.metrics.connection_cut,
        is_ending=lambda: service.phase == "draining",
    )


def stop_signals(service: Service) -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first SIGTERM or Ctrl-C and by the second, which also ends the engine process at once; the end of the
    terminal (SIGHUP) is one of them where there is no file of keys to read again."""
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if first.is_set():
            second.set()
            service.kill_engine()
        first.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    if service.keys.watches:
        loop.add_signal_handler(signal.SIGHUP, service.keys.refresh, True)
    elif signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup has it ignored
        loop.add_signal_handler(signal.SIGHUP, on_signal)
    return first, second


async def finish_requests(service: Service, at_once: asyncio.Event) -> None:
    limit = service.config.drain_timeout_s
    if service.num_responding:
        logger.info("finishing %d requests, at most %g s; Ctrl-C ends them at once", service.num_responding, limit)
    waiting = asyncio.create_task(at_once.wait())
    draining = asyncio.create_task(service.drain(limit))
    await asyncio.wait({draining, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, waiting):
        task.cancel()
    if service.num_responding:
        logger.warning("ending %d unfinished requests", service.num_responding)


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # every interface, by either kind of address
    try:
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        # Python adds the address to the system's words, and it is said here.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}; see --host and --port") from None


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def greeting(service: Service, url: str, seconds: float) -> str:
    ready = service.engine.ready
    limits = str(control_groups())
    key = " -H 'Authorization: Bearer YOUR_KEY'" if service.keys.asks else ""
    return (
        f"Slipstream {version('slipstream')} serves {service.model_names[0]} at {url} (ready after {seconds:.1f} s)\n"
        f"  weights {ready.weights} ({ready.weights_because}), cache {ready.kv_cache_dtype}, "
        f"on {ready.device}, {ready.kernels} kernels, context {ready.max_model_len} tokens, "
        f"KV cache for {ready.num_blocks * ready.block_size} tokens\n"
        + (f"  limited by its control group to {limits}\n" if limits else "")
        + f"  try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        """-d '{"messages": [{"role": "user", "content": "Hello!"}]}'"""
    )
