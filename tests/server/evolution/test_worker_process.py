"""The training worker's process as the server sees it: whatever becomes of it, it is told truly, and started again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from slipstream.server.evolution import worker
from slipstream.server.evolution.worker import WorkerProcess

SAYS = 'import os; print(\'{"state": "waiting", "message": "nothing to learn"}\', flush=True)\n'
FAILS = SAYS + 'print(\'{"state": "failed", "message": "no such model"}\', flush=True); os._exit(2)'
KILLED = SAYS + "os.kill(os.getpid(), 9)"
ENDS = SAYS + "os._exit(3)"
STRAY = "print('x' * (1 << 20)); print('{}'); print('[1]'); print('{\"state\": 3', flush=True)\n"
"""What is no report."""
GONE = ""


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[dict[str, Any]]]:
    """What a worker reports whose processes run these programs one after the other; the last of them waits."""

    def lives(programs: list[str]) -> list[dict[str, Any]]:
        coming = iter([*programs, SAYS + "import sys; sys.stdin.read()"])

        def command(*_: Any, **__: Any) -> list[str]:
            program = next(coming)
            return [sys.executable, "-P", "-c", program] if program else ["/nowhere/python"]

        monkeypatch.setattr(worker.child, "command", command)
        monkeypatch.setattr(worker, "FIRST_PAUSE", 0.0)
        reports: list[dict[str, Any]] = []

        async def run() -> None:
            process, last = WorkerProcess({}, lambda: 0), asyncio.Event()
            process.on_report.append(reports.append)
            process.on_report.append(lambda report: last.set() if process.restarts == len(programs) else None)
            task = asyncio.create_task(process.run())
            while not (last.is_set() and process.report["state"] == "waiting"):
                await asyncio.wait([task], timeout=0.01)
                assert not task.done(), task.exception()
            assert process.restarts == len(programs)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert process.pid is None

        asyncio.run(run())
        return reports

    return lives


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (FAILS, "no such model"),
        (KILLED, "it was ended by signal 9"),
        (ENDS, "it ended with exit code 3"),
        (STRAY + FAILS, "no such model"),
        (GONE, "No such file"),
    ],
)
def test_a_worker_that_ends_is_started_again_and_says_why(
    program: str, message: str, lives: Callable[[list[str]], list[dict[str, Any]]]
) -> None:
    reports = lives([program, program])
    ends = [i for i, report in enumerate(reports) if report["state"] == "failed" and i + 1 < len(reports)]
    assert message in [reports[i] for i in ends if reports[i + 1]["state"] == "starting"][-1]["message"]
    assert [report["state"] for report in reports[-2:]] == ["starting", "waiting"]


def test_what_was_said_earlier_is_no_reason(lives: Callable[[list[str]], list[dict[str, Any]]]) -> None:
    failed = [report["message"] for report in lives([FAILS, KILLED]) if report["state"] == "failed"]
    assert failed[-1] == "it was ended by signal 9"
