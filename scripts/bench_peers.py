"""Slipstream beside other servers, without speculation: all of them started here, in turns on the same prompts.

    python scripts/bench_peers.py --streams 1,8 \
        --ours bf16='--weights bfloat16' --ours packed='--weights packed --isa avx2' \
        --peer vllm=vllm,FOLDER,VENV --peer llama=llama,FILE.gguf,VENV --peer ov8=openvino,FOLDER,VENV

A round sends each server the same new prompts in turn, while the others stand still (SIGSTOP); every other round goes
the other way round. The table has medians with the range of the rounds, and ratios of ours to each peer round by round.
`--ttft-tokens 1000` asks for first tokens of such prompts, one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from slipstream.loadtest.arrivals import ClosedLoop
from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.harness import Target, connect, measure
from slipstream.loadtest.peers import PeerOptions, peer
from slipstream.loadtest.processes import ProcessTree
from slipstream.loadtest.report import summarise
from slipstream.loadtest.scrape import wait_idle
from slipstream.loadtest.workloads import Request, Workload, WorkloadOptions

SETTLE_SECONDS = 60.0
FIGURES = {"tokens/s": "output_throughput", "first token, ms": "median_ttft_ms", "per token, ms": "median_tpot_ms"}


@dataclass
class Server:
    name: str
    is_ours: bool
    target: Target
    processes: ProcessTree
    ready_seconds: float
    rounds: list[dict[str, Any]] = field(default_factory=list)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="append", default=[], help="NAME='OPTIONS of slipstream serve'")
    parser.add_argument("--peer", action="append", default=[], help="NAME=vllm|llama|openvino,MODEL,VENV[,ARGUMENTS]")
    parser.add_argument("--model", default="default", help="ours")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--ttft-tokens", type=int, default=0, help="0: not measured")
    parser.add_argument("--slots", type=int, default=8, help="of llama.cpp's server")
    parser.add_argument("--speculation", action="store_true", help="leave it on in ours")
    parser.add_argument("--workload", default="fixed", help="or another of docs/benchmarks.md, e.g. rewrite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="what the servers print")
    return parser.parse_args()


async def start(stack: AsyncExitStack, asked: argparse.Namespace) -> list[Server]:
    """All servers, those of ours first; each stands still once it is ready, while the next one starts."""
    servers = []
    for is_ours, text in [(True, each) for each in asked.ours] + [(False, each) for each in asked.peer]:
        name, _, what = text.partition("=")
        port = free_port()
        began = time.perf_counter()
        if is_ours:
            command = [sys.executable, "-P", "-m", "slipstream.server", "serve", "--model", asked.model]
            command += ["--port", str(port), "--log-level", "warning", *shlex.split(what)]
            command += [] if asked.speculation else ["--speculation", "off"]
            process = await stack.enter_async_context(running(name, command, port, log=asked.log))
        else:
            kind, model, venv, *more = what.split(",")
            chosen = PeerOptions(
                name=kind,  # checked by PeerOptions
                model=Path(model),
                venv=Path(venv),
                port=port,
                max_model_len=2048,
                slots=asked.slots,
                arguments=tuple(shlex.split(" ".join(more))),
            )
            process = await stack.enter_async_context(peer(chosen, log=asked.log))
        ready = time.perf_counter() - began
        # A connection for each request: a server that stood still finds the old ones idle for too long and closes them.
        target = await stack.enter_async_context(
            connect(f"http://127.0.0.1:{port}", timeout=600, headers={"Connection": "close"})
        )
        server = Server(name, is_ours, target, ProcessTree(process.pid), ready)
        note(f"{name} is ready after {ready:.1f} s")
        servers.append(server)
    # Chunks are counted on all sides or on none.
    counted = all(server.target.chunk_usage for server in servers)
    for server in servers:
        server.target = replace(server.target, chunk_usage=counted)
    return servers


async def round_of(servers: Sequence[Server], requests: Sequence[Request], streams: int, is_counted: bool) -> None:
    for server in servers:
        await wait_idle(server.target.client, SETTLE_SECONDS)
    for server in servers:
        with ExitStack() as stack:
            for other in servers:
                if other is not server:
                    stack.enter_context(other.processes.frozen())
            figures = summarise(await measure(server.target, requests, ClosedLoop(streams)))
        if figures["failed"]:
            raise SystemExit(f"{server.name}: {figures['errors']}")
        if is_counted:
            server.rounds.append(figures)


async def rounds(servers: Sequence[Server], asked: argparse.Namespace, streams: int, **lengths: int) -> dict[str, Any]:
    """The figures of counted rounds by server; one round before them warms up."""
    for server in servers:
        server.rounds = []
    workload = asked.workload if lengths["output_tokens"] > 1 else "fixed"
    chosen: dict[str, Any] = {"name": workload, "seed": asked.seed + streams, **lengths}
    prompts = Workload(WorkloadOptions(**chosen), servers[0].target.tokenizer)
    for number in range(-1, asked.rounds):
        requests = await prompts.round(max(streams, 2))
        await round_of(servers if number % 2 else servers[::-1], requests, streams, number >= 0)
        note(f"{streams} streams, round {number + 1} of {asked.rounds}")
    return {server.name: server.rounds for server in servers}


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def show(title: str, servers: Sequence[Server], found: dict[str, Any], figure: str) -> None:
    key = FIGURES[figure]
    peers = [server.name for server in servers if not server.is_ours]
    print(f"\n### {title}: {figure}\n\n| | {figure} |" + "".join(f" / {name} |" for name in peers))
    print("|---" * (2 + len(peers)) + "|")
    for server in servers:
        ours = [each[key] for each in found[server.name]]
        ratios = ""
        for name in peers:
            theirs = [each[key] for each in found[name]]
            pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
            ratios += f" {spread(pairs, 2)} |" if server.is_ours else " |"
        print(f"| {server.name} | {spread(ours)} |{ratios}")


async def main() -> None:
    asked = options()
    results: dict[str, Any] = {}
    this = asyncio.current_task()
    assert this is not None
    # As Ctrl-C does: or the servers would be left behind, standing still.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    async with AsyncExitStack() as stack:
        servers = await start(stack, asked)
        print(
            f"{processor()}; load {psutil.getloadavg()[0]:.1f}; ready after "
            + ", ".join(f"{server.name} {server.ready_seconds:.1f} s" for server in servers)
        )
        for streams in map(int, filter(None, asked.streams.split(","))):
            lengths = {"output_tokens": asked.output_tokens}
            if asked.workload == "fixed":
                lengths["input_tokens"] = asked.input_tokens
            found = results[str(streams)] = await rounds(servers, asked, streams, **lengths)
            for figure in FIGURES:
                show(f"{streams} streams", servers, found, figure)
        if asked.ttft_tokens:
            found = await rounds(servers, asked, 1, input_tokens=asked.ttft_tokens, output_tokens=1)
            results["ttft"] = found
            show(f"prompts of {asked.ttft_tokens} tokens", servers, found, "first token, ms")
    print(json.dumps({"asked": vars(asked) | {"log": None}, "processor": processor(), "results": results}))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {psutil.cpu_count()} cores"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
