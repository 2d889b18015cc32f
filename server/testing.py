"""A whole server in threads of this process, for tests and experiments: real HTTP, a real engine, no processes."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from safetensors.torch import save_file

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.drafter.traffic.tap import make_listeners
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.handle import EngineHandle
from slipstream.engine.testing.local import TINY_LLAMA
from slipstream.engine.testing.lora import random_lora, write_lora
from slipstream.engine.thread import start_thread
from slipstream.server import app
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.http.description import ErrorAnswer
from slipstream.server.launch import address, listen, make_service, serve
from slipstream.server.telemetry.log import formatter
from slipstream.server.text import load_tokenizer

PATIENCE_S = 300.0
Result = TypeVar("Result")
_server: contextvars.ContextVar[ServerThread | None] = contextvars.ContextVar("server", default=None)


async def start_in_thread(
    config: EngineConfig, traffic: TrafficConfig, server: ServerConfig, before: EngineHandle | None
) -> EngineHandle:
    """The engine of a server with everything plugged in, in a thread: what engine_process.py is as a process."""
    return await start_thread(config, make_drafters, lambda engine: make_listeners(traffic, engine), before)


def write_tiny_model(folder: Path, **config: Any) -> None:
    """Writes a model with random weights and the default model's tokenizer: for tests of all but what it says."""
    tokenizer = load_tokenizer("default")
    described = tokenizer.special_tokens | {"chat_template": tokenizer.chat_template}
    shape = TINY_LLAMA | {"vocab_size": tokenizer.vocab_size, "eos_token_id": list(tokenizer.eos_token_ids)} | config
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text(json.dumps(shape))
    save_file(dict(dummy_tensors(shape, 0)), folder / "model.safetensors")


def write_tiny_lora(folder: Path, seed: int = 0, rank: int = 4) -> Path:
    """Writes a LoRA for the tiny model, as PEFT does: random, and so large that answers are others; the folder."""
    shapes = {name: tensor.shape for name, tensor in dummy_tensors(TINY_LLAMA, 0)}
    modules = ("self_attn.q_proj", "mlp.down_proj")
    return write_lora(folder, random_lora(shapes, rank, seed, size=1.0, modules=modules), scale=2.0)


class ServerThread(logging.Handler):
    """``start``, then ``stop``. It has a port of its own, whatever its configuration says."""

    def __init__(
        self,
        config: ServerConfig,
        engine: EngineConfig,
        traffic: TrafficConfig | None = None,
        evolution: EvolutionConfig | None = None,
    ) -> None:
        super().__init__(config.log_level.upper())
        self.log: list[str] = []
        """Lines, as they would stand on stderr."""
        self.url = ""
        self._config, self._engine = config, engine
        self._traffic, self._evolution = traffic or TrafficConfig(), evolution or EvolutionConfig()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._listening: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self.setFormatter(formatter(config.log_format))

    def start(self) -> ServerThread:
        """Returns when it listens; raises what ``slipstream serve`` would tell the user."""
        logger = logging.getLogger("slipstream")
        logger.setLevel(min(self.level, logger.level or self.level))
        logger.addHandler(self)
        self._thread.start()
        self._listening.result(PATIENCE_S)
        return self

    def stop(self) -> int:
        """Waits for requests under way, as long as --drain-timeout-s says; 0, or raises what the server ended with."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server does not end"
        logging.getLogger("slipstream").removeHandler(self)
        self._ended.result(0)
        return 0

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Runs a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def filter(self, record: logging.LogRecord) -> bool:
        """Several servers in a process hear their own records each: contexts go with tasks and threads."""
        return _server.get() is self

    def emit(self, record: logging.LogRecord) -> None:
        self.log.append(self.format(record) + "\n")

    def _run(self) -> None:
        _server.set(self)
        try:
            self.service = make_service(self._config, self._engine, self._traffic, self._evolution, start_in_thread)
            with listen("127.0.0.1", 0) as listener:
                self.url = address(listener)
                uvloop.run(self._serve(listener))
        except BaseException as error:
            if not self._listening.done():
                self._listening.set_exception(error)
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _serve(self, listener: Any) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._listening.set_result(None)
        await serve(self.service, listener, time.monotonic(), self._stop, asyncio.Event())


FORKING = """
import gc, json, os, sys, tempfile
from slipstream.server import launch
from slipstream.server.commands import cli
gc.collect()
gc.freeze()  # or each fork would look through all that was imported, and have its pages copied for that
for line in sys.stdin:
    arguments, environment = json.loads(line)
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if not child:
        for number, file in enumerate((open(os.devnull), *files)):
            os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = arguments
        sys.exit(cli.main())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    print(json.dumps([status, *(file.read().decode() for file in files)]), flush=True)
"""


class Commands:
    """``slipstream`` as a process for each command: forked from one that has imported what it needs, which takes longer
    than most commands do. Close it in the end."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", FORKING]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """With ``PATH`` and these variables only."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([arguments, {"PATH": "/usr/bin:/bin", **environment}]), file=self._process.stdin, flush=True)
        return subprocess.CompletedProcess(arguments, *json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


PARAMETERS = {"name": ".+", "action": "[^/]+", "version": r"\d+", "other": r"\d+"}
"""Patterns of the parameters of paths."""


class Document:
    """An OpenAPI document, against which answers are held."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._paths = document["paths"]
        classes: tuple[Any, ...] = (*app.DESCRIBED, ErrorAnswer)
        self._classes = {found.__name__: found for found in classes}
        assert set(self._classes) <= set(document["components"]["schemas"])

    def operation(self, method: str, path: str) -> Any:
        path = urllib.parse.unquote(path.partition("?")[0])
        for template in sorted(self._paths, key=lambda template: template.count("{")):
            pattern = re.sub(r"\\{(\w+)\\}", lambda found: PARAMETERS[found[1]], re.escape(template))
            if re.fullmatch(pattern, path) and method in self._paths[template]:
                return self._paths[template][method]
        return None

    def check(self, method: str, path: str, status: int, headers: dict[str, str], body: bytes) -> None:
        operation = self.operation("get" if method == "HEAD" else method.lower(), path)
        kind = headers.get("content-type", "").partition(";")[0]
        if operation is None or method == "HEAD" or b'"unknown_route"' in body:
            if status >= 400 and body:
                ErrorAnswer.model_validate_json(body)
            return
        assert str(status) in operation["responses"], f"{method} {path} is not declared to answer {status}"
        content = operation["responses"][str(status)]["content"]
        assert kind in content, f"{method} {path} answers {status} with {kind}, not one of {list(content)}"
        if kind == "application/json":
            self._classes[content[kind]["schema"]["$ref"].rpartition("/")[2]].model_validate_json(body)
        elif kind == "text/event-stream":
            chunk = re.findall(r"#/components/schemas/(\w+)", json.dumps(content[kind]["schema"]))[0]
            for event in body.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
                data = event.partition("data: ")[2]
                (ErrorAnswer if data.startswith('{"error"') else self._classes[chunk]).model_validate_json(data)
