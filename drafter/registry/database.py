"""The registry's database: versions, their states and metrics, and what happened to them.

One SQLite file with a rollback journal. Every change is one transaction, so a process may be killed at any instruction:
SQLite undoes what it had begun when the next one opens the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slipstream.engine.errors import ModelError

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
"""How long a transaction waits for those of other processes; each takes milliseconds."""

SCHEMA = f"""
CREATE TABLE versions (
    version INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, also after pruning
    route TEXT NOT NULL,
    state TEXT NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    parent INTEGER REFERENCES versions (version) CHECK (parent < version),
    live_order INTEGER NOT NULL DEFAULT 0,  -- rises with every time that a version becomes live; 0: never was
    manifest BLOB NOT NULL
);
CREATE UNIQUE INDEX one_live_per_route ON versions (route) WHERE state = 'live';
CREATE UNIQUE INDEX one_canary_per_route ON versions (route) WHERE state = 'canary';
CREATE TABLE metrics (
    version INTEGER NOT NULL REFERENCES versions (version),
    name TEXT NOT NULL,
    value REAL NOT NULL,
    time REAL NOT NULL,
    PRIMARY KEY (version, name)
) WITHOUT ROWID;
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    version INTEGER NOT NULL REFERENCES versions (version),
    route TEXT NOT NULL,
    action TEXT NOT NULL,
    before TEXT NOT NULL,
    after TEXT NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX history_by_version ON history (version);
PRAGMA user_version = {SCHEMA_VERSION};
"""


class RegistryUnusableError(ModelError):
    """The registry's files are damaged, of a newer format, locked, or cannot be read or written."""


def prepare(path: Path) -> None:
    """Creates the tables where there are none; raises RegistryUnusableError for a newer file or no registry."""
    with transaction(path, create=True) as database:
        (found,) = database.execute("PRAGMA user_version").fetchone()
        if found == 0:
            for statement in SCHEMA.split(";\n"):
                database.execute(statement)
        elif found > SCHEMA_VERSION:
            raise RegistryUnusableError(
                f"{path} has format {found}, this version of Slipstream reads formats up to {SCHEMA_VERSION}; "
                "use the Slipstream that wrote it, or a newer one"
            )


@contextmanager
def transaction(path: Path, write: bool = True, create: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection of its own, which any thread may use; all of it happens, or none.

    Raises RegistryUnusableError if the file is no database or cannot be used.
    """
    address = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    try:
        database = sqlite3.connect(
            address, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield database
            database.execute("COMMIT")
        finally:
            database.close()  # undoes what was not committed
    except (sqlite3.DatabaseError, OSError) as error:
        raise RegistryUnusableError(f"cannot use the drafter registry {path}: {error}") from error
