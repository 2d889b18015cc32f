"""Where a body is read and tokenized, so that nothing a request contains holds up the others."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from slipstream.server.config import ServerConfig
from slipstream.server.jobs import JOBS
from slipstream.server.preparing import vetting
from slipstream.server.preparing.prepared import Limits, Packed, RunElsewhereError
from slipstream.server.preparing.text_model import TextModel
from slipstream.server.preparing.workers import Workers

INLINE_BYTES = 4 * 2**10
"""A body up to this size is done with on the event loop: that takes at most a few milliseconds."""
THREAD_BYTES = 16 * 2**10
"""Up to this size, in a thread. What parses JSON keeps the interpreter lock, which takes 20 ms at the worst; larger
ones go to a process."""
THREADS = 2
PROCESSES = 2
CPU_S = 5.0
"""Processor time for one body. The largest that is good for anything takes a tenth of it."""
TEMPLATE_PROCESSES = 2
TEMPLATE_CPU_S = 5.0
"""Processor time for a request that brings its own template, which may be a loop without end."""


class TextWork:
    """Runs the jobs of server/jobs.py."""

    def __init__(self, model: str, config: ServerConfig, limits: Limits, text: TextModel) -> None:
        self._text = text
        self._limits = limits
        self._behind = asyncio.Lock()
        self._threads = ThreadPoolExecutor(THREADS, "text")
        apart = replace(limits, is_apart=True)
        self._workers = Workers(PROCESSES, CPU_S, (model, config, apart))
        # Of their own, so that a hostile template keeps only others of its kind waiting.
        here = limits.request_templates if limits.request_templates == "refused" else "here"
        apart = replace(apart, request_templates=here)
        self._template_workers = Workers(TEMPLATE_PROCESSES, TEMPLATE_CPU_S, (model, config, apart))

    async def run(self, job: str, raw: bytes) -> Any:
        """Raises what the job raises. Cancelling ends what runs in a process."""
        try:
            if len(raw) <= INLINE_BYTES:
                return JOBS[job](self._text, self._limits, raw)
            if len(raw) <= THREAD_BYTES:
                work = partial(JOBS[job], self._text, self._limits, raw)
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
            found = await self._workers.run(job, raw)
        except RunElsewhereError:
            found = await self._template_workers.run(job, raw)
        if isinstance(found, Packed) and found.structure is not None:
            vetting.remember(found.structure.grammar)
        return await found.unpacked() if isinstance(found, Packed) else found

    async def run_behind(self, job: str, raw: bytes) -> Any:
        """As run, but one at a time, so that others find a free thread or process."""
        async with self._behind:
            return await self.run(job, raw)

    async def close(self) -> None:
        await self._workers.close()
        await self._template_workers.close()
