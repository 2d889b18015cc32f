"""Files and batches on disk: a folder ``{batches.sqlite, files/ID}``, which servers may share.

Every change is one transaction, so a process may be killed at any instruction. A file has its place before it has its
row; what has no row is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from slipstream.engine.errors import ConfigError
from slipstream.server.batch.records import OPEN, Batch, StoredFile
from slipstream.server.errors import ConflictError, InvalidRequestError, NotFoundError, RateLimitedError

BUSY_TIMEOUT_S = 10.0
MOST_OPEN = 100
"""Batches of one tenant that have not ended."""
RETRY_OPEN_S = 60
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL, expires_at INTEGER NOT NULL,
    record BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS files_of_owner ON files (owner);
CREATE TABLE IF NOT EXISTS batches (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL, status TEXT NOT NULL, input TEXT NOT NULL, record BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS batches_of_owner ON batches (owner);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
"""
Record = TypeVar("Record", StoredFile, Batch)
encode = msgspec.json.Encoder().encode
IS_OPEN = f"status IN ({', '.join(repr(status) for status in OPEN)})"


class BatchStore:
    """Blocks as long as the disk does: call it from threads. sqlite3.Error and OSError come as they are."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """``most_bytes`` of the files of each tenant. Raises ConfigError if the folder cannot be used."""
        self.folder = folder
        self._most_bytes = most_bytes
        try:
            for each in (folder, folder / "files"):  # readable by the owner only: it has what people say
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._transaction() as database:
                for statement in SCHEMA.split(";\n"):
                    database.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--batch-folder {folder} cannot be used: {error}") from error

    @contextmanager
    def running(self) -> Iterator[bool]:
        """Whether this process is the one that runs the batches, as long as the block lasts."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def path(self, file_id: str) -> Path:
        return self.folder / "files" / file_id

    # Files ----------------------------------------------------------------------------------------------------------

    def add_file(self, stored: StoredFile, content: IO[bytes]) -> None:
        """Raises InvalidRequestError if the tenant has no room for it."""
        path = self.path(stored.id)
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as copy:
                while piece := content.read(2**20):
                    copy.write(piece)
                copy.flush()
                os.fsync(copy.fileno())
            with self._transaction() as database:
                query = "SELECT COALESCE(SUM(bytes), 0) FROM files WHERE owner = ?"
                (held,) = database.execute(query, (stored.owner,)).fetchone()
                if held + stored.bytes > self._most_bytes:
                    raise InvalidRequestError(
                        f"file: your files have {held} bytes, and {stored.bytes} more would exceed {self._most_bytes} "
                        "(--max-stored-bytes); delete some",
                        param="file",
                        code="storage_full",
                    )
                _put_file(database, stored)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def file(self, owner: str, file_id: str) -> StoredFile:
        """Raises NotFoundError, whether it is another's or nobody's."""
        with self._transaction(write=False) as database:
            return _file(database, owner, file_id)

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """A page, and whether there is more; ``after`` is the last id of the page before. Raises NotFoundError."""
        where, values = ("AND purpose = ?", [purpose]) if purpose else ("", [])
        with self._transaction(write=False) as database:
            return _page(database, StoredFile, owner, after, limit, newest_first, where, values)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Raises NotFoundError, and ConflictError while an open batch reads it."""
        with self._transaction() as database:
            _file(database, owner, file_id)
            found = database.execute(f"SELECT id FROM batches WHERE input = ? AND {IS_OPEN}", (file_id,)).fetchone()
            if found is not None:
                raise ConflictError(f"{file_id} is the input of {found[0]}, which has not ended", code="file_in_use")
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    def expire(self) -> None:
        """Deletes files whose time is over, unless an open batch reads them."""
        query = f"SELECT id FROM files WHERE expires_at < ? AND id NOT IN (SELECT input FROM batches WHERE {IS_OPEN})"
        with self._transaction() as database:
            found = [each for (each,) in database.execute(query, (int(time.time()),))]
            database.executemany("DELETE FROM files WHERE id = ?", [(each,) for each in found])
        for each in found:
            self.path(each).unlink(missing_ok=True)

    # Batches --------------------------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        """Raises InvalidRequestError if there is no such input, RateLimitedError if there are too many."""
        with self._transaction() as database:
            try:
                found = _file(database, batch.owner, batch.input_file_id)
            except NotFoundError as error:
                raise InvalidRequestError(f"input_file_id: {error.message}", param="input_file_id") from None
            if found.purpose != "batch":
                raise InvalidRequestError("input_file_id: its purpose is not 'batch'", param="input_file_id")
            query = f"SELECT COUNT(*) FROM batches WHERE owner = ? AND {IS_OPEN}"
            (count,) = database.execute(query, (batch.owner,)).fetchone()
            if count >= MOST_OPEN:
                raise RateLimitedError(
                    f"{count} batches of yours have not ended; wait for one of them",
                    retry_after_s=RETRY_OPEN_S,
                    reason="batches",
                )
            database.execute(
                "INSERT INTO batches (id, owner, status, input, record) VALUES (?, ?, ?, ?, ?)",
                (batch.id, batch.owner, batch.status, batch.input_file_id, encode(batch)),
            )

    def batch(self, owner: str, batch_id: str) -> Batch:
        """Raises NotFoundError, whether it is another's or nobody's."""
        with self._transaction(write=False) as database:
            return _batch(database, owner, batch_id)

    def batches(
        self, owner: str, kind: str, after: str | None, limit: int, newest_first: bool = True
    ) -> tuple[list[Batch], bool]:
        """A page of those whose names begin with ``kind``, and whether there is more. Raises NotFoundError."""
        with self._transaction(write=False) as database:
            return _page(database, Batch, owner, after, limit, newest_first, "AND id GLOB ?", [f"{kind}*"])

    def delete_batch(self, owner: str, batch_id: str) -> None:
        """With its files. Raises NotFoundError, and ConflictError for one that has not ended."""
        with self._transaction() as database:
            batch = _batch(database, owner, batch_id)
            if batch.status in OPEN:
                raise ConflictError(f"{batch_id} has not ended; cancel it first", code="batch_not_ended")
            database.execute("DELETE FROM batches WHERE id = ?", (batch_id,))
            files = [batch.input_file_id, batch.output_id, batch.error_id]
            database.executemany("DELETE FROM files WHERE id = ?", [(each,) for each in files])
        for each in files:
            self.path(each).unlink(missing_ok=True)

    def open_batches(self) -> list[Batch]:
        """Those of all tenants, oldest first."""
        with self._transaction(write=False) as database:
            rows = database.execute(f"SELECT record FROM batches WHERE {IS_OPEN} ORDER BY number").fetchall()
        return [msgspec.json.decode(record, type=Batch) for (record,) in rows]

    def change(
        self, owner: str, batch_id: str, change: Callable[[Batch], None], files: Sequence[StoredFile] = ()
    ) -> Batch:
        """Changes a batch as it is now, and adds files that are in their places; all of it happens, or none."""
        with self._transaction() as database:
            batch = _batch(database, owner, batch_id)
            change(batch)
            for stored in files:
                _put_file(database, stored)
            database.execute(
                "UPDATE batches SET status = ?, record = ? WHERE id = ?", (batch.status, encode(batch), batch_id)
            )
        return batch

    @contextmanager
    def _transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        path = self.folder / "batches.sqlite"
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield database
            database.execute("COMMIT")  # what an exception leaves is undone


def _put_file(database: sqlite3.Connection, stored: StoredFile) -> None:
    database.execute(
        "INSERT INTO files (id, owner, purpose, bytes, expires_at, record) VALUES (?, ?, ?, ?, ?, ?)",
        (stored.id, stored.owner, stored.purpose, stored.bytes, stored.expires_at, encode(stored)),
    )


def _file(database: sqlite3.Connection, owner: str, file_id: str) -> StoredFile:
    row = database.execute("SELECT record FROM files WHERE id = ? AND owner = ?", (file_id, owner)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no file {file_id[:100]!r}", code="file_not_found")
    return msgspec.json.decode(row[0], type=StoredFile)


def no_batch(batch_id: str) -> NotFoundError:
    return NotFoundError(f"there is no batch {batch_id[:100]!r}", code="batch_not_found")


def _batch(database: sqlite3.Connection, owner: str, batch_id: str) -> Batch:
    row = database.execute("SELECT record FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
    if row is None:
        raise no_batch(batch_id)
    return msgspec.json.decode(row[0], type=Batch)


def _page(
    database: sqlite3.Connection,
    kind: type[Record],
    owner: str,
    after: str | None,
    limit: int,
    newest_first: bool,
    where: str = "",
    values: Sequence[str] = (),
) -> tuple[list[Record], bool]:
    table = "files" if kind is StoredFile else "batches"
    bound: list[str | int] = [owner, *values]
    if after is not None:
        row = database.execute(f"SELECT number FROM {table} WHERE id = ? AND owner = ?", (after, owner)).fetchone()
        if row is None:
            raise NotFoundError(f"after: there is no {after[:100]!r}", param="after", code="cursor_not_found")
        where += f" AND number {'<' if newest_first else '>'} ?"
        bound.append(row[0])
    order = "DESC" if newest_first else "ASC"
    query = f"SELECT record FROM {table} WHERE owner = ? {where} ORDER BY number {order} LIMIT ?"
    rows = database.execute(query, (*bound, limit + 1)).fetchall()
    return [msgspec.json.decode(record, type=kind) for (record,) in rows[:limit]], len(rows) > limit
