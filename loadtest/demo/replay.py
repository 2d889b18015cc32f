"""Real prompts asked for the sake of what is kept of their answers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from slipstream.loadtest.children import free_port, running
from slipstream.loadtest.harness import Target, connect, receive
from slipstream.loadtest.record import RequestRecord
from slipstream.loadtest.workloads import Request, Workload


@dataclass(slots=True)
class Replay:
    """Traffic to learn from: prompts that are used once."""

    workload: Workload
    target: Target
    sent: int = 0
    failed: int = 0
    tokens: int = 0

    async def run(self, streams: int, enough: Callable[[], bool], **fields: Any) -> None:
        """Runs so many streams, each with one request after the other, until it is enough; answers are awaited."""

        async def stream() -> None:
            while not enough():
                [request] = await self.workload.round(1)
                record = RequestRecord(due=perf_counter(), start=perf_counter())
                await receive(self.target, Request(request.path, request.body | fields), record)
                self.sent += 1
                self.failed += not record.ok
                self.tokens += record.output_tokens

        async with asyncio.TaskGroup() as tasks:
            for _ in range(streams):
                tasks.create_task(stream())


async def keep_answers(workload: Workload, folder: Path, count: int, streams: int) -> Replay:
    """Answers of a server of its own to so many prompts, with features, in a traffic store; its log lies beside it.

    Raises ClientError if the server does not start.
    """
    port = free_port()
    options = {"--port": port, "--speculation": "off", "--traffic-log": "features", "--traffic-folder": folder}
    command = [sys.executable, "-P", "-m", "slipstream.server", "serve", "--no-prefix-caching"]
    command += [str(part) for pair in options.items() for part in pair]
    log = folder.parent / f"{folder.name}.log"
    async with running("server", command, port, log=log), connect(f"http://127.0.0.1:{port}", timeout=600) as target:
        replay = Replay(workload, target)
        await replay.run(streams, lambda: replay.sent + streams > count)
    return replay
