"""All versions of a drafter: their files, states and lineage, shared by several processes.

Listing and state changes import no torch, so the API process can do them; whatever touches tensors does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from slipstream.drafter.registry import manifest as manifests
from slipstream.drafter.registry.database import RegistryUnusableError, prepare, transaction
from slipstream.drafter.registry.manifest import Manifest, Origin, Training
from slipstream.drafter.registry.states import (
    Event,
    RegistryError,
    State,
    TransitionError,
    UnknownVersionError,
    Version,
    as_version,
    find,
    find_predecessor,
    find_state,
    log,
    move,
    name_of,
    require_epoch,
    require_finite,
)
from slipstream.drafter.registry.version_folder import (
    Weights,
    check_fit,
    intact,
    lock,
    read_weights,
    sync_folder,
    temporary_folder,
    write_manifest,
    write_weights,
)
from slipstream.engine.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from slipstream.drafter.head.config import HeadConfig

DATABASE_FILE = "registry.sqlite"
LOCK_FILE = "writers.lock"
VERSIONS_FOLDER = "versions"


class Registry:
    """A folder of versions. Any number of processes and threads may use it at once."""

    def __init__(self, folder: Path | str, create: bool = True, open_now: bool = True) -> None:
        """Opens the registry and removes what writers that died have left.

        ``open_now=False`` touches no file: where the registry is damaged every call says so, and calls work again as
        soon as it is mended.

        Raises RegistryUnusableError if it is damaged or cannot be used, as all methods do, and another ModelError if
        there is none and none is to be or can be created.
        """
        self.folder = Path(folder).expanduser()
        self.database = self.folder / DATABASE_FILE
        self._versions = self.folder / VERSIONS_FOLDER
        self._lock_path = self.folder / LOCK_FILE
        self._epoch: int | None = None
        """Set if it changes things only while nobody else has taken control."""
        if open_now:
            self._open(create)

    def _open(self, create: bool) -> None:
        there = os.path.lexists(self.database)
        if not create and not there:
            raise ModelError(f"there is no drafter registry in {self.folder}")
        try:
            # Drafters are distilled from what users wrote: nobody else may read them.
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._versions.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            if there:
                raise RegistryUnusableError(f"cannot use the drafter registry in {self.folder}: {error}") from error
            raise ModelError(f"cannot create a drafter registry in {self.folder}: {error}") from error
        prepare(self.database)
        with suppress(RegistryUnusableError):  # it can be read, perhaps, and what is left over harms nobody
            self.clean()

    # What there is

    def get(self, version: int) -> Version:
        """Raises UnknownVersionError. Of pruned versions the manifest is left."""
        with self._read() as database:
            return as_version(database, find(database, version))

    def list(self, route: str | None = None, pruned: bool = False) -> Sequence[Version]:
        """Oldest first; those of one route, or all."""
        query = "SELECT * FROM versions WHERE (? IS NULL OR route = ?) AND (? OR state != 'pruned') ORDER BY version"
        with self._read() as database:
            return [as_version(database, row) for row in database.execute(query, (route, route, pruned)).fetchall()]

    def count(self) -> Mapping[State, int]:
        """Versions by state, pruned ones included."""
        with self._read() as database:
            return dict(database.execute("SELECT state, COUNT(*) FROM versions GROUP BY state").fetchall())

    def live(self, route: str = "") -> Version | None:
        """What the route's requests are to be drafted with; no fallback to the shared one."""
        return self._in_state("live", route)

    def serving(self, route: str = "") -> Version | None:
        """What drafts for a route's requests: the shared version where it has none of its own."""
        return self.live(route) or (self.live() if route else None)

    def canary(self, route: str = "") -> Version | None:
        """What a share of the route's requests is to be drafted with."""
        return self._in_state("canary", route)

    def may_serve(self, route: str = "") -> Sequence[int]:
        """The live version, then those that rollbacks would make live one after the other; empty if none is live."""
        query = (
            "SELECT version, state FROM versions WHERE route = ? AND (state = 'live' OR state = 'retired' AND "
            "live_order > 0) ORDER BY state = 'live' DESC, live_order DESC"
        )
        with self._read() as database:
            rows = database.execute(query, (route,)).fetchall()
        return [row["version"] for row in rows] if rows and rows[0]["state"] == "live" else []

    def predecessor(self, route: str = "") -> Version | None:
        """What ``roll_back`` would make live again if there is no canary."""
        with self._read() as database:
            row = find_predecessor(database, route)
            return None if row is None else as_version(database, row)

    def history(self, version: int | None = None, after: int = 0) -> Sequence[Event]:
        """What happened, oldest first; of one version or all; only events with ids above ``after``."""
        query = "SELECT * FROM history WHERE (? IS NULL OR version = ?) AND id > ? ORDER BY id"
        with self._read() as database:
            return [Event(**row) for row in database.execute(query, (version, version, after))]

    # Changes of state; each is one transaction

    def under(self, epoch: int) -> Registry:
        """The same registry, whose changes raise NotInControlError once somebody has taken control after this epoch."""
        registry = Registry(self.folder, open_now=False)
        registry._epoch = epoch
        return registry

    def promote(self, version: int, reason: str = "") -> Version:
        """Makes it live; the one that was live is retired.

        Raises UnknownVersionError, or TransitionError if it is live already, was rolled back or is pruned.
        """
        with self._write() as database:
            route = find(database, version)["route"]
            live = find_state(database, "live", route)
            if live is not None and live["version"] != version:
                move(database, live["version"], "retired", "retired", f"version {version} was promoted")
            move(database, version, "live", "promoted", reason)
            return as_version(database, find(database, version))

    def start_canary(self, version: int, reason: str = "") -> Version:
        """A share of its route's requests is to run on it; at most one version per route is a canary."""
        with self._write() as database:
            route = find(database, version)["route"]
            if (other := find_state(database, "canary", route)) is not None:
                raise TransitionError(f"{name_of(route)} has a canary already, drafter version {other['version']}")
            move(database, version, "canary", "canary started", reason)
            return as_version(database, find(database, version))

    def retire(self, version: int, reason: str = "") -> Version:
        """Takes a candidate or canary out of use without blame, or a live version, which leaves none."""
        with self._write() as database:
            move(database, version, "retired", "retired", reason)
            return as_version(database, find(database, version))

    def roll_back(self, route: str = "", reason: str = "", version: int | None = None) -> Version | None:
        """Takes the canary out; or, without one, the live version, and makes the one before it live again.

        ``version`` says which of the two is meant, so that a verdict on one version never hits its successor. Returns
        what is live now: None if nothing was live before. Raises TransitionError if there is nothing to roll back.
        """
        with self._write() as database:
            running = [find_state(database, "canary", route), find_state(database, "live", route)]
            failed = next((row for row in running if row is not None and version in (None, row["version"])), None)
            if failed is None:
                wanted = "neither a canary nor a live version"
                what = wanted if version is None else f"version {version} neither live nor as canary"
                raise TransitionError(f"{name_of(route)} has {what}, so there is nothing to roll back")
            move(database, failed["version"], "rolled-back", "rolled back", reason)
            before = find_predecessor(database, route)
            if failed["state"] == "live" and before is not None:
                move(database, before["version"], "live", "restored", f"version {failed['version']} was rolled back")
            now = find_state(database, "live", route)
            return None if now is None else as_version(database, now)

    def pin(self, version: int, reason: str = "") -> Version:
        """Keeps it from being pruned."""
        return self._set_pinned(version, True, reason)

    def unpin(self, version: int, reason: str = "") -> Version:
        return self._set_pinned(version, False, reason)

    def record_metrics(self, version: int, metrics: Mapping[str, float]) -> None:
        """Keeps the latest value of each, beside those of the gate in the manifest; raises RegistryError for NaN."""
        require_finite(metrics)
        with self._write() as database:
            find(database, version)
            database.executemany(
                "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)",
                [(version, name, float(value), time.time()) for name, value in metrics.items()],
            )

    # Files

    def add(
        self,
        config: HeadConfig,
        weights: Weights,
        *,
        target: str,
        origin: Origin,
        target_name: str = "",
        route: str = "",
        parent: int | None = None,
        training: Training | None = None,
        gate: Mapping[str, float] | None = None,
        note: str = "",
    ) -> Version:
        """Publishes a head as a candidate; matrices are stored in bfloat16.

        Args:
            target: fingerprint of the model it drafts for.
            gate: scores on held-out traffic.

        Raises:
            ModelError: tensors do not fit the configuration.
            RegistryUnusableError: the files cannot be written.
            RegistryError: a score of the gate is not a finite number.
            UnknownVersionError: there is no such parent.
        """
        require_finite(gate or {})
        with self._files(), lock(self._lock_path, fcntl.LOCK_SH), temporary_folder(self._versions) as folder:
            size, digest = write_weights(folder, config, weights)
            with self._write() as database:
                if parent is not None:
                    find(database, parent)
                row = database.execute(
                    "INSERT INTO versions (route, state, parent, manifest) VALUES (?, '', ?, x'')",
                    (route, parent),
                )
                assert row.lastrowid is not None
                manifest = Manifest(
                    version=row.lastrowid,
                    head=config.to_json(),
                    parent=parent,
                    target=target,
                    target_name=target_name,
                    origin=origin,
                    route=route,
                    note=note,
                    training=training or Training(),
                    gate=dict(gate or {}),
                    weights_bytes=size,
                    weights_sha256=digest,
                    created_at=datetime.now(UTC),
                )
                write_manifest(folder, manifest)
                log(database, find(database, manifest.version), "added", "candidate", note or origin)
                database.execute(
                    "UPDATE versions SET state = 'candidate', manifest = ? WHERE version = ?",
                    (manifests.encode(manifest), manifest.version),
                )
                final = self.path(manifest.version)
                # Left by a writer that died between renaming and committing; nobody else renames while we write.
                shutil.rmtree(final, ignore_errors=True)
                folder.rename(final)
                sync_folder(self._versions)
                return as_version(database, find(database, manifest.version))

    def path(self, version: int) -> Path:
        """Folder of a version's files."""
        return self._versions / f"{version:06d}"

    def open_version(
        self, version: int, fingerprint: str | None, fingerprint_name: str = ""
    ) -> tuple[HeadConfig, dict[str, Tensor]]:
        """The head of a version, for a model with this fingerprint (and name, for messages); None asks for no model.

        Raises:
            UnknownVersionError: there is no such version, or it is pruned.
            ModelError: it was made for another model or by a newer Slipstream, or a byte of it has changed.
        """
        manifest = self._published(version)
        if fingerprint is not None:
            check_fit(manifest, fingerprint, fingerprint_name)
        return read_weights(self.path(version), manifest)

    def weights(self, version: int) -> Path:
        """The file of a version's weights, whatever model it is for; raises as ``open_version``, but needs no torch."""
        return intact(self.path(version), self._published(version))

    def _published(self, version: int) -> Manifest:
        known = self.get(version)
        if known.state == "pruned":
            raise UnknownVersionError(f"drafter version {version} is pruned: its weights are gone")
        if known.damage:
            raise ModelError(known.damage)
        manifest = manifests.read(self.path(version))
        if manifest != known.manifest:
            raise ModelError(f"the manifest in {self.path(version)} is not the one that was published")
        return manifest

    def prune(self, keep: int, route: str | None = None, reason: str = "") -> Sequence[int]:
        """Deletes the weights of all but the newest ``keep`` versions per route; which ones.

        Live, canary and pinned versions, and those that a rollback would make live again, stay and are not counted.
        """
        if keep < 0:
            raise RegistryError(f"prune: cannot keep {keep} versions")
        pruned = []
        with self._files(), lock(self._lock_path, fcntl.LOCK_SH):
            with self._write() as database:
                routes = [row[0] for row in database.execute("SELECT DISTINCT route FROM versions")]
                for each in routes if route is None else [route]:
                    spared = find_predecessor(database, each)
                    query = (
                        "SELECT * FROM versions WHERE route = ? AND NOT pinned AND version IS NOT ? "
                        "AND state IN ('candidate', 'retired', 'rolled-back') ORDER BY version DESC LIMIT -1 OFFSET ?"
                    )
                    for row in database.execute(query, (each, spared and spared["version"], keep)).fetchall():
                        move(database, row["version"], "pruned", "pruned", reason)
                        pruned.append(row["version"])
            for version in pruned:
                shutil.rmtree(self.path(version), ignore_errors=True)
        return sorted(pruned)

    def clean(self) -> None:
        """Removes folders that belong to no version, unless somebody is writing now."""
        with self._files(), lock(self._lock_path, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            if not locked:
                return
            with self._read() as database:
                rows = database.execute("SELECT version FROM versions WHERE state != 'pruned'").fetchall()
            known = {self.path(row["version"]) for row in rows}
            for folder in self._versions.iterdir():
                if folder not in known:
                    shutil.rmtree(folder, ignore_errors=True)

    def _in_state(self, state: State, route: str) -> Version | None:
        with self._read() as database:
            row = find_state(database, state, route)
            return None if row is None else as_version(database, row)

    def _set_pinned(self, version: int, pinned: bool, reason: str) -> Version:
        with self._write() as database:
            row = find(database, version)
            if row["state"] == "pruned":
                raise TransitionError(f"drafter version {version} is pruned: its weights are gone")
            database.execute("UPDATE versions SET pinned = ? WHERE version = ?", (pinned, version))
            log(database, row, "pinned" if pinned else "unpinned", row["state"], reason)
            return as_version(database, find(database, version))

    @contextmanager
    def _files(self) -> Iterator[None]:
        """Around what the operating system may refuse."""
        try:
            yield
        except OSError as error:
            raise RegistryUnusableError(f"cannot use the drafter registry in {self.folder}: {error}") from error

    def _read(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self.database, write=False)

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with transaction(self.database) as database:
            if self._epoch is not None:
                require_epoch(database, self._epoch, self.folder)
            yield database


def is_registry(folder: Path) -> bool:
    return os.path.lexists(folder / DATABASE_FILE)


def default_folder() -> Path:
    """Where a user's drafters are kept if nothing else is said."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "slipstream" / "drafters"
