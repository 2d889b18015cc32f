"""Other servers to compare with, each started from its own virtual environment: vLLM, llama.cpp and OpenVINO GenAI.

Nothing of them is a dependency of this project; ``scripts/install-peers.sh`` makes such an environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from slipstream.loadtest.children import running

PeerName = Literal["vllm", "llama", "openvino"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerOptions:
    name: PeerName
    model: Path
    """vllm: a Hugging Face folder; llama: a GGUF file; openvino: a folder that optimum-intel exported."""
    venv: Path
    port: int = 8001
    max_model_len: int = 4096
    dtype: str = "bfloat16"
    """What vLLM computes in; the others compute as the file is quantised."""
    ngram: int = 0
    """Tokens of n-gram speculation per step, 0 for none; vLLM only."""
    slots: int = 8
    """llama: requests that run at the same time, each with a context of ``max_model_len``."""
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
        threads = str(len(os.sched_getaffinity(0)))
        match self.name:
            case "vllm":
                command = [str(self.python.with_name("vllm")), "serve", model, "--dtype", self.dtype]
                command += ["--max-model-len", length, "--host", "127.0.0.1", "--port", port]
                if self.ngram:
                    speculation = {"method": "ngram", "num_speculative_tokens": self.ngram, "prompt_lookup_max": 4}
                    command += ["--speculative-config", msgspec.json.encode(speculation).decode()]
            case "llama":
                command = [str(self.python.with_name("llama-server")), "--model", model]
                command += ["--parallel", str(self.slots), "--ctx-size", str(self.slots * self.max_model_len)]
                command += ["--threads", threads, "--threads-batch", threads, "--host", "127.0.0.1", "--port", port]
            case "openvino":
                program = Path(__file__).with_name("openvino_server.py")
                command = [str(self.python), str(program), model, port, threads]
        return [*command, *self.arguments]

    def environment(self) -> dict[str, str]:
        # The peer must not import what this process imports from.
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # vLLM compiles with tools it finds on the path, its own environment's first.
        path = f"{self.python.parent}{os.pathsep}{own.get('PATH', '')}"
        defaults = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
        return {**defaults, **own, "PATH": path}


def peer(
    options: PeerOptions, ready_timeout: float = 300.0, log: Path | None = None
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """A running peer that takes requests; see ``children.running``."""
    command, environment = options.command(), options.environment()
    return running(options.name, command, options.port, environment, ready_timeout=ready_timeout, log=log)


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
