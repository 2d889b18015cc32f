"""The training worker's process as the server sees it: started, told of the load, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from slipstream.engine import child

logger = logging.getLogger(__name__)
MODULE = "slipstream.drafter.training.worker"
LOAD_SECONDS = 0.05
"""How often the worker may be told of a change in load; what it does is of the lowest priority anyway."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a worker that died is started again; doubles each time it dies soon."""
HEALTHY_SECONDS = 60.0


class WorkerProcess:
    """The training process, told in lines of drafter/training/control.py, which is not imported: it needs torch."""

    def __init__(self, options: dict[str, Any], running: Callable[[], int]) -> None:
        """``options``: fields of WorkerOptions. ``running``: how many requests run now."""
        self._options = options
        self._running = running
        self._process: asyncio.subprocess.Process | None = None
        self._paused = False
        self.report: dict[str, Any] = {"state": "starting"}
        """The worker's last line."""
        self.restarts = 0
        self.on_report: list[Callable[[dict[str, Any]], None]] = []

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keeps a worker running until cancelled."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            self._take({"state": "starting"})
            try:
                why = _describe(await self._run_once())
            except OSError as error:  # there is no process to be had now
                why = str(error)
            finally:
                await self._end()
            self.restarts += 1
            if self.report["state"] == "failed":  # it has said so itself
                why = self.report.get("message") or why
            self._take({"state": "failed", "message": why})
            pause = FIRST_PAUSE if time.monotonic() - began > HEALTHY_SECONDS else min(2 * pause, LONGEST_PAUSE)
            logger.warning("the training worker ended (%s); starting it again in %g s", why, pause)
            await asyncio.sleep(pause)

    @property
    def paused(self) -> bool:
        """Whether ``pause`` has paused training; requests do not count."""
        return self._paused

    def send(self, kind: str, **fields: Any) -> None:
        """One line to the worker; lost if there is none now."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(msgspec.json.encode({"type": kind, **fields}) + b"\n")

    def stand_by(self, why: str) -> None:
        """Says that there is to be no worker now."""
        self._take({"state": "waiting", "message": why})

    def pause(self, paused: bool) -> None:
        """Pauses training, or has it go on, until told otherwise, also over restarts."""
        self._paused = paused
        self.send("pause", paused=paused)

    async def _run_once(self) -> int:
        self._process = await asyncio.create_subprocess_exec(
            *child.command(MODULE, msgspec.json.encode(self._options).decode(), priority="lowest"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            # Ctrl-C reaches the whole process group; the worker ends when its standard input does.
            start_new_session=True,
        )
        if self._paused:
            self.send("pause", paused=True)
        telling = asyncio.create_task(self._tell())
        try:
            assert self._process.stdout is not None
            while (report := await _next_report(self._process.stdout)) is not None:
                if report["state"] == "failed":
                    logger.error("the training worker says: %s", report.get("message"))
                if report["state"] in ("published", "refused"):
                    logger.info("drafter trained: %s (%s)", report["state"], report.get("message"))
                self._take(report)
            return await self._process.wait()
        finally:
            telling.cancel()

    async def _tell(self) -> None:
        """The load, whenever it changes between none and some."""
        told = None
        while True:
            running = self._running()
            if bool(running) != told:
                told = bool(running)
                self.send("load", running=running)
            await asyncio.sleep(LOAD_SECONDS)

    def _take(self, report: dict[str, Any]) -> None:
        self.report = report
        for callback in self.on_report:
            callback(report)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            # It saves where it stands.
            await asyncio.wait_for(child.hasten(process), 5)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await child.hasten(process)


async def _next_report(lines: asyncio.StreamReader) -> dict[str, Any] | None:
    """Passes over what libraries print there; None when the worker has ended."""
    while True:
        try:
            if not (line := await lines.readline()):
                return None
            report = msgspec.json.decode(line, type=dict[str, Any])
        except (ValueError, msgspec.DecodeError):  # it is too long for a report, or is none
            continue
        if "state" in report:
            return report


def _describe(code: int) -> str:
    """How a process has ended."""
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with exit code {code}"
