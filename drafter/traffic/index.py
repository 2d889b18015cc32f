"""The index of the traffic store: which sample lies in which shard, whose it is, and what was purged. Needs no torch.

A folder ``{index.sqlite, shards/*.safetensors}``. Every shard belongs to one tenant. Shards get their final name, and
files are deleted, inside a transaction that holds the index's write lock: whoever holds it sees no shard that is about
to be indexed, so a file without a row is left over from a process that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from slipstream.engine.errors import ConfigError

FORMAT = 3
HOLDOUT = 10
"""One question in so many is held out of training."""
BUSY_S = 10.0
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE purges (tenant BLOB PRIMARY KEY, time REAL NOT NULL, number INTEGER NOT NULL DEFAULT 0);
CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, file TEXT NOT NULL, tenant TEXT NOT NULL,
    bytes INTEGER NOT NULL, oldest REAL NOT NULL);
CREATE TABLE samples (id INTEGER PRIMARY KEY AUTOINCREMENT, shard INTEGER NOT NULL, place INTEGER NOT NULL,
    tenant TEXT NOT NULL, time REAL NOT NULL, num_tokens INTEGER NOT NULL, fields TEXT NOT NULL, question INTEGER);
CREATE INDEX samples_of_shard ON samples (shard);
CREATE INDEX samples_of_tenant ON samples (tenant);
"""
QUESTION = "COALESCE(samples.question, samples.id)"
EVERYBODY = b"*"
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class TrafficUnusableError(ConfigError):
    """The files of a traffic store are damaged, locked, or cannot be read or written."""


def guarded(
    method: Callable[Concatenate[TrafficIndex, Parameters], Result],
) -> Callable[Concatenate[TrafficIndex, Parameters], Result]:
    """What the database or the operating system refuses becomes TrafficUnusableError, and so does a file that has gone:
    what is written to it, nobody would find."""

    @wraps(method)
    def call(self: TrafficIndex, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            if self._opened is not None and _identity(self._path) != self._opened:
                raise FileNotFoundError(f"{self._path.name} was removed or replaced while it was open")
            return method(self, *args, **kwargs)
        except (sqlite3.Error, OSError) as error:
            raise TrafficUnusableError(
                f"the traffic store in {self.folder} is damaged or cannot be used: {error}; mend it, or move the "
                "folder away"
            ) from error

    return call


@dataclass(frozen=True, slots=True)
class TenantStatistics:
    samples: int
    tokens: int
    bytes: int
    oldest: float
    """Seconds since 1970, like ``newest``."""
    newest: float


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sample lies, and what is known of it without opening its shard."""

    id: int
    shard: Path
    place: int
    tenant: str
    time: float
    fields: dict[str, Any]
    question: int


def held_out(question: int) -> bool:
    """Whether training must not see samples of this question: they are for the gate.

    All of a question are on one side: an answer that was learned says nothing of how well a head drafts others.
    """
    digest = hashlib.blake2b(question.to_bytes(8, "little", signed=True), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HOLDOUT == 0


class TrafficIndex:
    """Several processes may have the same folder open; only ``TrafficStore.append`` adds to it."""

    def __init__(self, folder: str | Path, create: bool = False) -> None:
        """Raises ConfigError where there is no store, or one of a newer format, or a folder of something else; and
        TrafficUnusableError for a damaged one, as all methods do.
        """
        self.folder = Path(folder).expanduser()
        self.shards = self.folder / "shards"
        self._path = self.folder / "index.sqlite"
        self._opened: tuple[int, int] | None = None
        """Which file the database is; None before it is open."""
        self._open(create)

    @guarded
    def _open(self, create: bool) -> None:
        path = self._path
        if not path.exists():
            if not create:
                raise ConfigError(f"{self.folder} is no traffic store: it has no {path.name}")
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(f"{self.folder} is no traffic store and is not empty")
        if create:
            self.shards.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self.shards.chmod(0o700)
            # What SQLite puts beside it later gets the same mode. Never opened if it exists: closing it again would
            # take away the locks that SQLite holds for other connections of this process ("how to corrupt", 2.2).
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"cannot open the traffic store {path}: {error}") from None
        try:
            self._prepare()
            self._opened = _identity(path)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.create_function("held_out", 1, held_out, deterministic=True)
        with self.transaction():
            [found] = self._db.execute("PRAGMA user_version").fetchone()
            if found > FORMAT:
                raise ConfigError(f"the traffic store in {self.folder} has format {found}; this version reads {FORMAT}")
            if found == 0:
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
            if found == 1:
                self._db.execute("ALTER TABLE samples ADD COLUMN question INTEGER")
            if found in (1, 2):
                self._db.execute("ALTER TABLE purges ADD COLUMN number INTEGER NOT NULL DEFAULT 0")
            if found < FORMAT:
                self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        self._db.close()

    @guarded
    def lock(self) -> int | None:
        """A descriptor that makes its holder the one that appends, until it is closed; None if there is another."""
        lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        return lock

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Holds the write lock of the index."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # where the disk is full, SQLite may have ended it by itself
                self._db.execute("ROLLBACK")
            raise

    # What there is --------------------------------------------------------------------------------------------------

    @guarded
    def statistics(self) -> dict[str, TenantStatistics]:
        """Statistics by tenant."""
        sizes = dict(self._db.execute("SELECT tenant, SUM(bytes) FROM shards GROUP BY tenant"))
        rows = self._db.execute(
            "SELECT tenant, COUNT(*), SUM(num_tokens), MIN(time), MAX(time) FROM samples GROUP BY tenant ORDER BY 1"
        )
        return {
            tenant: TenantStatistics(count, tokens, sizes.get(tenant, 0), oldest, newest)
            for tenant, count, tokens, oldest, newest in rows
        }

    @guarded
    def totals(self) -> tuple[int, int]:
        """Bytes of the shards and tokens in them."""
        [size] = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM shards").fetchone()
        [tokens] = self._db.execute("SELECT COALESCE(SUM(num_tokens), 0) FROM samples").fetchone()
        return size, tokens

    @guarded
    def questions(self) -> dict[int, int]:
        """The question of every sample by its id; the id itself in stores that did not know yet what was asked."""
        return dict(self._db.execute(f"SELECT id, {QUESTION} FROM samples"))

    @guarded
    def entries(
        self,
        since_id: int,
        tenant: str | None,
        order: Literal["recent", "oldest"],
        holdout: bool | None,
        limit: int,
        below_id: int | None = None,
    ) -> list[Entry]:
        """At most ``limit`` samples with since_id < id < below_id."""
        conditions, values = ["samples.id > ?"], [since_id]
        for condition, value in (
            ("samples.id < ?", below_id),
            ("samples.tenant = ?", tenant),
            (f"held_out({QUESTION}) = ?", holdout),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)  # type: ignore[arg-type]
        rows = self._db.execute(
            f"SELECT samples.id, file, place, samples.tenant, time, fields, {QUESTION} FROM samples JOIN shards "
            f"ON shards.id = shard WHERE {' AND '.join(conditions)} "
            f"ORDER BY samples.id {'DESC' if order == 'recent' else 'ASC'} LIMIT ?",
            [*values, limit],
        )
        return [
            Entry(number, self.shards / file, place, owner, when, _parse(fields), question)
            for number, file, place, owner, when, fields, question in rows
        ]

    # What goes ------------------------------------------------------------------------------------------------------

    @guarded
    def purge(self, tenant: str | None = None) -> int:
        """Deletes everything of a tenant, or of all; returns how many samples that were.

        Requests that arrived before now and are not written yet will not be: ``is_purged`` tells the writer. Purges are
        numbered, since clocks are put back and forward.
        """
        who, owned, values = (EVERYBODY, "", []) if tenant is None else (_name(tenant), " WHERE tenant = ?", [tenant])
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO purges VALUES (?, ?, ?)", (who, time.time(), self._last_purge() + 1))
            [count] = db.execute(f"SELECT COUNT(*) FROM samples{owned}", values).fetchone()
            self._delete(db, db.execute(f"SELECT id, file FROM shards{owned}", values).fetchall())
            # Unfinished files are the business of who appends, if anybody does.
            lock = self.lock()
            self._delete_orphans(db, "*.safetensors" if lock is None else "*")
            if lock is not None:
                os.close(lock)
        # The log still holds the rows; empty it, too.
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(count)

    @guarded
    def is_purged(self, tenant: str, known: int) -> bool:
        """Whether a tenant was purged since ``known`` was the number of the last purge."""
        found = self._db.execute("SELECT MAX(number) FROM purges WHERE tenant IN (?, ?)", (EVERYBODY, _name(tenant)))
        [last] = found.fetchone()
        return last is not None and known < last

    @guarded
    def last_purge(self) -> int:
        """The number of the last purge; 0 before the first."""
        return self._last_purge()

    def _last_purge(self) -> int:
        [last] = self._db.execute("SELECT COALESCE(MAX(number), 0) FROM purges").fetchone()
        return int(last)

    @guarded
    def expire(self, max_bytes: int, max_age: float) -> None:
        """Deletes shards with anything older than ``max_age`` seconds, and the oldest beyond ``max_bytes``."""
        with self.transaction() as db:
            kept = 0
            gone = []
            for number, file, size, oldest in db.execute(
                "SELECT id, file, bytes, oldest FROM shards ORDER BY id DESC"
            ).fetchall():
                kept += size
                if kept > max_bytes or oldest < time.time() - max_age:
                    gone.append((number, file))
                    kept -= size
            self._delete(db, gone)

    @guarded
    def clean(self) -> None:
        """Deletes what a killed process left: files without a row, rows without a file. For who holds the lock."""
        with self.transaction() as db:
            rows = db.execute("SELECT id, file FROM shards").fetchall()
            self._delete(db, [(number, file) for number, file in rows if not (self.shards / file).exists()])
            self._delete_orphans(db, "*")

    @guarded
    def claim(self, target: str, files: str) -> None:
        """Says that from now on the traffic is that of this target, whose weights begin as these files have them.

        Raises ConfigError if the folder holds another target's.
        """
        with self.transaction() as db:
            known = dict(db.execute("SELECT key, value FROM meta"))
            [count] = db.execute("SELECT COUNT(*) FROM samples").fetchone()
            if known.get("target", target) != target and count:
                raise ConfigError(
                    f"{self.folder} holds the traffic of another model: choose another --traffic-folder, or empty it "
                    f"with 'slipstream traffic purge --all --folder {self.folder}'"
                )
            new = {"target": target, "files": files}
            before = known.get("files", known.get("target"))  # before there were lineages, the target was the files
            if before not in (None, files):
                new["files_since"] = repr(time.time())
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", new.items())

    @guarded
    def check(self, target: str) -> None:
        """Raises ConfigError if the traffic is known to be another target's than this; see ``claim``."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'target'").fetchone()
        if row is not None and row[0] != target:
            raise ConfigError(
                f"{self.folder} holds the traffic of another model, or of another lineage of it: --model and "
                "--target-lineage must be those of the server that kept it"
            )

    @guarded
    def files_since(self) -> float:
        """When the target's weights began to come from the files of the server that wrote last, in seconds since 1970.

        What arrived earlier was answered by other weights, also where its ``target_version`` is 0.
        """
        row = self._db.execute("SELECT value FROM meta WHERE key = 'files_since'").fetchone()
        return float(row[0]) if row is not None else 0.0

    def _delete(self, db: sqlite3.Connection, shards: Sequence[tuple[int, str]]) -> None:
        for number, file in shards:
            (self.shards / file).unlink(missing_ok=True)
            db.execute("DELETE FROM samples WHERE shard = ?", (number,))
            db.execute("DELETE FROM shards WHERE id = ?", (number,))

    def _delete_orphans(self, db: sqlite3.Connection, pattern: str) -> None:
        known = {file for (file,) in db.execute("SELECT file FROM shards")}
        for path in self.shards.glob(pattern):
            if path.name not in known:
                path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """What is known of the file at this path; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _parse(fields: str) -> dict[str, Any]:
    """Empty if they are damaged."""
    try:
        found = json.loads(fields)
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(tenant: str) -> bytes:
    """What remains of a purged tenant's name."""
    return hashlib.blake2b(tenant.encode(), digest_size=16).digest()
