"""What all dialects of batches need: the store, if there is one, and who runs what is in it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from fastapi import Request
from starlette.types import ASGIApp

from slipstream.server.access.consent import DOMAIN_HEADER, LEVEL_HEADER
from slipstream.server.batch.records import Batch
from slipstream.server.batch.runner import BatchRunner
from slipstream.server.batch.store import BatchStore, no_batch
from slipstream.server.batch.upload import RETRY_DISK_S
from slipstream.server.errors import ConflictError, InvalidRequestError, UnavailableError
from slipstream.server.http.headers import header_values
from slipstream.server.service import Service

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


async def ask(method: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
    """What a method of the store returns. Raises UnavailableError where the disk refuses."""
    try:
        return await asyncio.to_thread(method, *arguments, **named)
    except (OSError, sqlite3.Error) as error:
        raise UnavailableError(
            f"--batch-folder cannot be used: {error}", code="storage_unusable", retry_after_s=RETRY_DISK_S
        ) from error


class BatchDesk:
    def __init__(self, service: Service, app: ASGIApp) -> None:
        """``app``, which has all routes, is asked for what batches consist of. Raises ConfigError for the folder."""
        self._store: BatchStore | None = None
        self._runner: BatchRunner | None = None
        if (folder := service.config.batch_folder) is not None:
            self._store = BatchStore(Path(folder).expanduser(), service.config.max_stored_bytes)
            self._runner = BatchRunner(service, self._store, app)
            service.companions.add(self._runner)

    @property
    def store(self) -> BatchStore:
        """Raises ConflictError."""
        if self._store is None:
            raise ConflictError("this server has no batches; start it with --batch-folder FOLDER", code="no_batches")
        return self._store

    def wake(self) -> None:
        """Something has changed in the store."""
        if self._runner is not None:
            self._runner.wake()

    async def batch(self, owner: str, name: str, kind: str) -> Batch:
        """``kind`` is how its name begins. Raises NotFoundError, also for one of another kind."""
        store = self.store
        require_kind(name, kind)
        return await ask(store.batch, owner, name)

    async def cancel(self, owner: str, name: str, kind: str) -> Batch:
        """Ends a batch; raises ConflictError if it has ended otherwise, and what ``batch`` raises."""
        store = self.store
        require_kind(name, kind)

        def become_cancelling(batch: Batch) -> None:
            if batch.status in ("validating", "in_progress"):
                batch.become("cancelling", time.time())
            elif batch.status not in ("cancelling", "cancelled"):
                raise ConflictError(f"{name} is {batch.status}, and cannot be cancelled", code="batch_not_cancellable")

        batch = await ask(store.change, owner, name, become_cancelling)
        self.wake()
        return batch


def require_kind(name: str, kind: str) -> None:
    if not name.startswith(kind):
        raise no_batch(name)


def said_of_all(request: Request) -> dict[str, str]:
    """Headers of the request that makes a batch which count for all requests in it."""
    found = {name: ", ".join(header_values(request.scope, name.lower())) for name in (LEVEL_HEADER, DOMAIN_HEADER)}
    return {name: value for name, value in found.items() if value}


def page_size(query: dict[str, str], default: int, most: int) -> int:
    """Raises InvalidRequestError."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= most):
        raise InvalidRequestError(f"limit: 1 to {most}, not {text[:60]!r}", param="limit")
    return int(text)
