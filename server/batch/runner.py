"""Runs the batches of a store, one server of all that share it at a time, as offline requests of their owners.

What is done is what stands in the files of answers. So a server may be killed at any moment: the next one reads them,
and asks for what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from starlette.types import ASGIApp

from slipstream.server.access.account import Account, UsageLimits
from slipstream.server.access.principal import Principal
from slipstream.server.batch.call import CallAnswer, call
from slipstream.server.batch.lines import (
    AnswerLine,
    Progress,
    RequestLine,
    ResponseOfLine,
    check,
    decode_request,
    one_line,
    pieces,
    refusal,
)
from slipstream.server.batch.records import (
    OPEN,
    Batch,
    BatchStatus,
    LineProblem,
    RequestCounts,
    StoredFile,
    UsageOfBatch,
    fresh,
)
from slipstream.server.batch.store import BatchStore
from slipstream.server.errors import InvalidRequestError
from slipstream.server.service import Service

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""How soon batches of other servers, and what they cancelled, are seen."""
EXPIRE_S = 60.0
SAVE_S = 1.0
RETRY_S, LATEST_RETRY_S = 5.0, 30.0
LEFT: dict[BatchStatus, tuple[str, str]] = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed before the batch was cancelled."),
}


LOST = "The server's folder has lost the input file; send it again for what has no answer."


class Turns:
    """How many requests are under way: rows of the engine, shared evenly between owners and then between batches."""

    def __init__(self, rows: int, most_bytes: int) -> None:
        self._rows, self._most_bytes = rows, most_bytes
        self._batches: dict[str, str] = {}
        """Owners, by batch."""
        self._under_way: Counter[str] = Counter()
        self._num_bytes = 0
        self._changed = asyncio.Event()

    def join(self, batch: Batch) -> None:
        self._batches[batch.id] = batch.owner

    def leave(self, batch: Batch) -> None:
        """When none of its requests are under way."""
        del self._batches[batch.id], self._under_way[batch.id]
        self._changed.set()

    def _share(self, batch_id: str) -> int:
        owners = Counter(self._batches.values())
        return max(1, self._rows // len(owners) // owners[self._batches[batch_id]])

    def _has_room(self, batch_id: str, num_bytes: int) -> bool:
        if self._num_bytes and self._num_bytes + num_bytes > self._most_bytes:
            return False
        return self._under_way[batch_id] < self._share(batch_id)

    async def take(self, batch_id: str, num_bytes: int) -> None:
        while not self._has_room(batch_id, num_bytes):
            self._changed.clear()
            await self._changed.wait()
        self._under_way[batch_id] += 1
        self._num_bytes += num_bytes

    def give_back(self, batch_id: str, num_bytes: int) -> None:
        self._under_way[batch_id] -= 1
        self._num_bytes -= num_bytes
        self._changed.set()


class BatchRunner:
    """Between ``start`` and ``stop``, which leaves what is under way for the next start."""

    def __init__(self, service: Service, store: BatchStore, app: ASGIApp) -> None:
        """``app`` is behind the gate: what it is asked comes with its principal."""
        self._service, self._store, self._app = service, store, app
        self._turns = Turns(service.engine_config.max_running, service.config.max_body_bytes)
        self._accounts: dict[str, Account] = {}
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._told = ""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def wake(self) -> None:
        """Something has changed in the store."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                with self._store.running() as is_mine:
                    if is_mine:
                        await self._supervise()
            except (OSError, sqlite3.Error) as error:
                self._tell(str(error))
            except Exception:
                logger.exception("batches stand still")
            await asyncio.sleep(POLL_S)

    def _tell(self, reason: str) -> None:
        """Why batches stand still, once for each reason; none: they go on."""
        if reason and reason != self._told:
            logger.error("batches stand still: %s; --batch-folder %s is tried every second", reason, self._store.folder)
        elif self._told and not reason:
            logger.info("batches go on")
        self._told = reason

    async def _supervise(self) -> None:
        """Every open batch has a task."""
        expired = 0.0
        try:
            while True:
                self._wake.clear()
                try:
                    if time.monotonic() - expired > EXPIRE_S:
                        await asyncio.to_thread(self._store.expire)
                        expired = time.monotonic()
                    for batch in await asyncio.to_thread(self._store.open_batches):
                        await self._look_after(batch)
                    self._tell("")
                except (OSError, sqlite3.Error) as error:
                    self._tell(str(error))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), POLL_S)
        finally:
            for job in self._jobs.values():
                job.cancel()
            if self._jobs:
                await asyncio.wait(self._jobs.values())
            self._jobs.clear()

    async def _look_after(self, batch: Batch) -> None:
        job = self._jobs.get(batch.id)
        if batch.status == "cancelling" and batch.id not in self._cancelled:
            if job is not None:
                job.cancel()
                await asyncio.wait({job})  # which forgets it
                job = None
            self._cancelled.add(batch.id)
        if job is None or job.done():
            self._jobs[batch.id] = job = asyncio.create_task(self._until_it_ends(batch))
            job.add_done_callback(lambda done: self._forget(batch.id, done))

    def _forget(self, batch_id: str, job: asyncio.Task[None]) -> None:
        if self._jobs.get(batch_id) is job:
            del self._jobs[batch_id]
            self._cancelled.discard(batch_id)

    async def _until_it_ends(self, batch: Batch) -> None:
        while True:
            try:
                return await self._advance(batch)
            except* (OSError, sqlite3.Error) as errors:
                logger.error(
                    "%s stands still: %s; --batch-folder %s is tried again in %g s, and answers that it has are kept",
                    *(batch.id, errors.exceptions[0], self._store.folder, LATEST_RETRY_S),
                )
            except* Exception:
                logger.exception("%s failed, and is tried again", batch.id)
            await asyncio.sleep(LATEST_RETRY_S)

    async def _advance(self, batch: Batch) -> None:
        batch = await asyncio.to_thread(self._store.batch, batch.owner, batch.id)
        if batch.status not in OPEN:
            return
        path = self._store.path(batch.input_file_id)
        is_lost = not await asyncio.to_thread(path.exists)
        if batch.status == "validating" and not is_lost:
            most = self._service.config.max_body_bytes
            total, problems, model = await asyncio.to_thread(check, path, batch.endpoint, most)

            def begin(found: Batch) -> None:
                if found.status == "validating":
                    found.become("failed" if problems else "in_progress", time.time())
                    found.errors, found.model, found.counts = problems, model, RequestCounts(total)

            batch = await self._change(batch, begin)
            if batch.status == "failed":
                return
        progress = await asyncio.to_thread(
            Progress, self._store.path(batch.output_id), self._store.path(batch.error_id)
        )
        progress.counts.total = batch.counts.total
        try:
            end: BatchStatus = "completed" if batch.status == "finalizing" else "cancelled"
            if is_lost and batch.status in ("validating", "in_progress"):
                end = "failed"
            elif batch.status == "in_progress":
                end = await self._answer_all(batch, progress)
            await self._finish(batch, progress, end)
        finally:
            await asyncio.to_thread(progress.close)

    async def _answer_all(self, batch: Batch, progress: Progress) -> BatchStatus:
        self._turns.join(batch)
        saver = asyncio.create_task(self._save(batch, progress))
        try:
            async with asyncio.timeout(batch.expires_at - time.time()), asyncio.TaskGroup() as group:
                remaining = pieces(self._store.path(batch.input_file_id))
                while piece := await asyncio.to_thread(next, remaining, None):
                    for _, line in piece:
                        request = decode_request(line)
                        if request.custom_id not in progress.done:
                            await self._turns.take(batch.id, len(line))
                            task = group.create_task(self._answer(batch, request, progress))
                            # Not by the task itself: cancelled before it begins, it does nothing at all.
                            task.add_done_callback(partial(self._answered, batch.id, len(line)))
        except TimeoutError:
            return "expired"
        finally:
            saver.cancel()
            self._turns.leave(batch)
        return "completed"

    async def _save(self, batch: Batch, progress: Progress) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            counted = await asyncio.to_thread(progress.counted)
            with contextlib.suppress(OSError, sqlite3.Error):
                await self._change(batch, partial(self._count, counted))

    def _answered(self, batch_id: str, size: int, task: asyncio.Task[None]) -> None:
        self._turns.give_back(batch_id, size)

    async def _answer(self, batch: Batch, request: RequestLine, progress: Progress) -> None:
        name = fresh("batch_req_")
        answer = None
        if (reason := refusal(request.body)) is not None:
            answer = CallAnswer(400, {}, InvalidRequestError(reason, param=reason.partition(":")[0]).body())
        while answer is None:
            answer = await self._ask(batch, bytes(request.body), name)
        line = AnswerLine(name, request.custom_id, ResponseOfLine(answer.status, name, one_line(answer.body)))
        await asyncio.to_thread(progress.write, line)

    async def _ask(self, batch: Batch, body: bytes, name: str) -> CallAnswer | None:
        """None, after a while: the answer says nothing about the request."""
        principal = self._principal(batch)
        if principal is None:
            logger.warning("%s waits: there is no key %r any more", batch.id, batch.key)
            await asyncio.sleep(LATEST_RETRY_S)
            return None
        try:
            answer = await call(self._app, batch.endpoint, body, batch.headers, principal, name)
        except Exception:
            logger.exception("%s of %s failed", name, batch.id)
            return CallAnswer(500, {}, b'{"error": {"message": "internal error; see the server\'s log"}}')
        if answer.status in (429, 503):
            await asyncio.sleep(min(max(answer.retry_after_s, RETRY_S), LATEST_RETRY_S))
            return None
        return answer

    def _principal(self, batch: Batch) -> Principal | None:
        found = self._service.keys.named(batch.key)
        if found is None:
            return None
        account = self._accounts.setdefault(batch.key, Account(is_offline=True))
        account.limits = UsageLimits(weight=found.account.limits.weight)
        return Principal(found.key, found.role, found.limits, account)

    async def _finish(self, batch: Batch, progress: Progress, end: BatchStatus) -> None:
        batch = await self._change(batch, lambda found: None)
        if batch.status == "cancelling":
            end = "cancelled"
        elif end == "completed" and batch.status == "in_progress":
            await self._change(batch, lambda found: found.become("finalizing", time.time()))
        path = self._store.path(batch.input_file_id)
        # What was not begun nobody knows to be readable; and the file may be lost.
        if end in LEFT and batch.in_progress_at is not None and await asyncio.to_thread(path.exists):
            await asyncio.to_thread(progress.leave, path, *LEFT[end])
        output, errors = await asyncio.to_thread(progress.sync)
        counted = await asyncio.to_thread(progress.counted)
        now = int(time.time())
        files = [
            StoredFile(
                id=name,
                owner=batch.owner,
                bytes=size,
                created_at=now,
                expires_at=now + batch.output_seconds,
                filename=f"{batch.id}_{kind}.jsonl",
                purpose="batch_output",
            )
            for name, size, kind in ((batch.output_id, output, "output"), (batch.error_id, errors, "error"))
            if size
        ]

        def close(found: Batch) -> None:
            self._count(counted, found)
            found.has_output, found.has_errors = output > 0, errors > 0
            found.left = progress.left
            if end == "failed":
                found.errors = [LineProblem(code="input_file_lost", message=LOST)]
            found.become(end, now)

        await self._change(batch, close, files)
        for name in {batch.output_id, batch.error_id} - {stored.id for stored in files}:
            await asyncio.to_thread(self._store.path(name).unlink, missing_ok=True)

    @staticmethod
    def _count(counted: tuple[RequestCounts, UsageOfBatch], batch: Batch) -> None:
        if batch.status in OPEN:  # a thread that saves may come late, and know less than the end
            batch.counts, batch.usage = counted

    async def _change(self, batch: Batch, change: Callable[[Batch], None], files: Sequence[StoredFile] = ()) -> Batch:
        return await asyncio.to_thread(self._store.change, batch.owner, batch.id, change, files)
