"""Versions, the states they can be in and what may follow what, as rows of the registry's database."""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.manifest import Manifest
from slipstream.engine.errors import ModelError, SlipstreamError

State = Literal["candidate", "canary", "live", "retired", "rolled-back", "pruned"]
MAY_BECOME: Mapping[State, frozenset[State]] = {
    "canary": frozenset({"candidate", "retired"}),
    "live": frozenset({"candidate", "canary", "retired"}),
    "retired": frozenset({"candidate", "canary", "live"}),
    "rolled-back": frozenset({"canary", "live"}),
    "pruned": frozenset({"candidate", "retired", "rolled-back"}),
}
"""The states a version may come from."""


class RegistryError(SlipstreamError):
    """The registry does not have what was asked for, or does not allow it."""


class NotInControlError(RegistryError):
    """Another server decides for this registry."""


class UnknownVersionError(RegistryError):
    """There is no such version."""


class TransitionError(RegistryError):
    """A version cannot go from its state to the one asked for."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A version as it is now."""

    version: int
    route: str
    state: State
    pinned: bool
    manifest: Manifest
    metrics: dict[str, float]
    """Latest values of what was recorded after it was published, such as live acceptance."""
    damage: str = ""
    """What is wrong with the manifest, of which then nothing is known; empty if it can be read."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the audit trail."""

    id: int
    time: float
    """Seconds since 1970."""
    version: int
    route: str
    action: str
    before: str
    """State; empty for a version that was not there."""
    after: str
    reason: str


def find(database: sqlite3.Connection, version: int) -> sqlite3.Row:
    row: sqlite3.Row | None = None
    if abs(version) < 1 << 63:  # SQLite has no larger numbers
        row = database.execute("SELECT * FROM versions WHERE version = ?", (version,)).fetchone()
    if row is None:
        raise UnknownVersionError(f"there is no drafter version {version}")
    return row


def find_state(database: sqlite3.Connection, state: State, route: str) -> sqlite3.Row | None:
    """The version of a route in a state that only one of them can have."""
    query = "SELECT * FROM versions WHERE state = ? AND route = ?"
    row: sqlite3.Row | None = database.execute(query, (state, route)).fetchone()
    return row


def find_predecessor(database: sqlite3.Connection, route: str) -> sqlite3.Row | None:
    """The latest of the versions that were live and left in good standing."""
    query = (
        "SELECT * FROM versions WHERE route = ? AND state = 'retired' AND live_order > 0 "
        "ORDER BY live_order DESC LIMIT 1"
    )
    row: sqlite3.Row | None = database.execute(query, (route,)).fetchone()
    return row


def as_version(database: sqlite3.Connection, row: sqlite3.Row) -> Version:
    """One that cannot be read must not hide the others."""
    number, damage = row["version"], ""
    try:
        manifest = manifests.decode(row["manifest"], f"drafter version {number}")
    except ModelError as error:
        manifest, damage = manifests.unknown(number, row["route"]), str(error)
    metrics = database.execute("SELECT name, value FROM metrics WHERE version = ?", (row["version"],))
    return Version(
        version=row["version"],
        route=row["route"],
        state=row["state"],
        pinned=bool(row["pinned"]),
        manifest=manifest,
        metrics={each["name"]: each["value"] for each in metrics},
        damage=damage,
    )


def move(database: sqlite3.Connection, version: int, state: State, action: str, reason: str) -> None:
    """Moves a version to another state; raises UnknownVersionError or TransitionError."""
    row = find(database, version)
    if row["state"] not in MAY_BECOME[state]:
        raise TransitionError(f"drafter version {version} is {row['state']}; it cannot become {state}")
    database.execute("UPDATE versions SET state = ? WHERE version = ?", (state, version))
    if state == "live":
        database.execute(
            "UPDATE versions SET live_order = (SELECT max(live_order) FROM versions) + 1 WHERE version = ?", (version,)
        )
    log(database, row, action, state, reason)


def log(database: sqlite3.Connection, row: sqlite3.Row, action: str, after: State, reason: str) -> None:
    """Writes an event; ``row`` is the version as it was before."""
    database.execute(
        "INSERT INTO history (time, version, route, action, before, after, reason) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (time.time(), row["version"], row["route"], action, row["state"], after, reason),
    )


def epoch_of(database: sqlite3.Connection) -> int:
    """Epoch of the server that took control last; 0 if none ever did."""
    # The table comes with the first controller; registries that were made before there were any have none.
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'control'").fetchone() is None:
        return 0
    (epoch,) = database.execute("SELECT epoch FROM control").fetchone()
    return int(epoch)


def raise_epoch(database: sqlite3.Connection, above: int) -> int:
    """The next epoch, for a server that takes control: above all that there were, and above this number."""
    epoch = max(epoch_of(database), above) + 1
    database.execute("CREATE TABLE IF NOT EXISTS control (epoch INTEGER NOT NULL)")
    database.execute("DELETE FROM control")
    database.execute("INSERT INTO control VALUES (?)", (epoch,))
    return epoch


def require_epoch(database: sqlite3.Connection, epoch: int, folder: Path) -> None:
    if (latest := epoch_of(database)) > epoch:
        raise NotInControlError(
            f"another server has taken control of the drafter registry in {folder} (epoch {latest}, this one's is "
            f"{epoch}): it decides, this one follows"
        )


def require_finite(scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise RegistryError(f"{name} is {value}, which is no score")


def name_of(route: str) -> str:
    return f"route {route!r}" if route else "the shared route"
