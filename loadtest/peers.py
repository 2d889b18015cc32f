"""Other servers to compare with, each started from its own virtual environment: vLLM and llama.cpp.

Nothing of them is a dependency of this project; ``scripts/install-peers.sh`` makes such an environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from slipstream.clients.aio import AsyncClient
from slipstream.clients.errors import ClientError

PeerName = Literal["vllm", "llama"]
STOP_SECONDS = 20.0
STDERR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerOptions:
    name: PeerName
    model: Path
    """vllm: a Hugging Face folder; llama: a GGUF file."""
    venv: Path
    port: int = 8001
    max_model_len: int = 4096
    dtype: str = "bfloat16"
    """Of vLLM; llama.cpp computes as the file is quantised."""
    ngram: int = 0
    """Tokens of n-gram speculation per step, 0 for none; vLLM only."""
    arguments: tuple[str, ...] = ()
    """More command-line arguments for the peer, passed on as they are."""

    def __post_init__(self) -> None:
        if self.name not in get_args(PeerName):
            raise ValueError(f"unknown peer {self.name!r}; there are {', '.join(get_args(PeerName))}")
        if not self.model.exists():
            raise ValueError(f"no such model: {self.model}")
        if self.name == "llama" and self.ngram:
            raise ValueError("n-gram speculation is offered for vllm only")
        if not self.python.exists():
            raise ValueError(
                f"{self.venv} is no virtual environment: make one with scripts/install-peers.sh {self.venv}"
            )

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        model, port, length = str(self.model), str(self.port), str(self.max_model_len)
        match self.name:
            case "vllm":
                command = [str(self.python.with_name("vllm")), "serve", model, "--dtype", self.dtype]
                command += ["--max-model-len", length, "--host", "127.0.0.1", "--port", port]
                if self.ngram:
                    speculation = {"method": "ngram", "num_speculative_tokens": self.ngram, "prompt_lookup_max": 4}
                    command += ["--speculative-config", msgspec.json.encode(speculation).decode()]
            case "llama":
                command = [str(self.python), "-m", "llama_cpp.server", "--model", model, "--n_ctx", length]
                threads = str(len(os.sched_getaffinity(0)))
                command += ["--n_threads", threads, "--n_threads_batch", threads]
                # By default a new request breaks off the one that runs.
                command += ["--interrupt_requests", "false"]
                command += ["--host", "127.0.0.1", "--port", port]
        return [*command, *self.arguments]

    def environment(self) -> dict[str, str]:
        # The peer must not import what this process imports from.
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # vLLM compiles with tools it finds on the path, its own environment's first.
        path = f"{self.python.parent}{os.pathsep}{own.get('PATH', '')}"
        defaults = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
        return {**defaults, **own, "PATH": path}


@asynccontextmanager
async def peer(options: PeerOptions, ready_timeout: float = 300.0) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running peer that takes requests; ended with all its processes when the block is left.

    Its output goes to this process's stderr. Raises ClientError if it ends before it is ready or never gets ready.
    """
    if _taken(options.port):
        raise ClientError(f"port {options.port} is taken: stop what listens there or choose another --port")
    # A session of its own: a Ctrl-C in the terminal reaches only us, and one signal reaches all its processes.
    process = await asyncio.create_subprocess_exec(
        *options.command(), env=options.environment(), stdout=STDERR, start_new_session=True
    )
    try:
        await _wait_ready(process, options, ready_timeout)
        yield process
    finally:
        await _stop(process)


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _wait_ready(process: asyncio.subprocess.Process, options: PeerOptions, timeout: float) -> None:
    async with AsyncClient(options.url) as client:
        ready = asyncio.ensure_future(client.wait_ready(timeout))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ClientError(f"{options.name} ended with status {process.returncode} before it was ready")
            await ready
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """SIGINT, then SIGKILL for what is left of its session."""
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def serve(options: PeerOptions, ready_timeout: float) -> int:
    """Run a peer in the foreground until SIGINT, SIGTERM or its own end; the exit status for the command."""
    loop = asyncio.get_running_loop()
    serving = asyncio.current_task()
    assert serving is not None
    stopped = False

    def on_signal() -> None:
        nonlocal stopped
        if not stopped:  # once: a second cancellation would break off the clean end
            stopped = True
            serving.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    start = loop.time()
    try:
        async with peer(options, ready_timeout) as process:
            print(
                f"{options.name} is ready after {loop.time() - start:.1f} s: {options.url}", file=sys.stderr, flush=True
            )
            status = await process.wait()
            print(f"{options.name} ended by itself with status {status}", file=sys.stderr)
            return 1
    except asyncio.CancelledError:
        if not stopped:
            raise
        return 0
