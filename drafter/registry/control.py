"""Which of the servers that use a registry decides for it.

On one machine a lock on a file says so, and is free as soon as its holder is gone. Where locks of files mean nothing
(some shared file systems), every one that takes the lock also raises a number in the database, and decisions under a
lower number are refused: so two may believe that they are in control, but only one can decide.
"""

from __future__ import annotations

import fcntl
import os

from slipstream.drafter.registry.database import RegistryUnusableError, transaction
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import NotInControlError, epoch_of, raise_epoch

__all__ = ["Control", "NotInControlError"]
LOCK_FILE = "control.lock"


class Control:
    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock: int | None = None
        self._is_lost = False
        self.registry: Registry | None = None
        """The registry to decide with; None without control."""
        self.epoch = 0
        """Rises with every one that takes control; without control that of the one who has it."""

    def take(self) -> Registry | None:
        """What to decide with, if nobody else is in control; raises RegistryUnusableError."""
        if self.registry is None and not self._is_lost:
            with transaction(self._registry.database, write=False) as database:
                self.epoch = max(self.epoch, epoch_of(database))
            if self._lock is None and not self._try_lock():
                return None
            with transaction(self._registry.database) as database:
                self.epoch = raise_epoch(database, self.epoch)
            self.registry = self._registry.under(self.epoch)
        return self.registry

    def lose(self) -> None:
        """Gives control up for good: somebody took control past the lock, and taking it back would go on for ever."""
        self._is_lost = True
        self.release()

    def release(self) -> None:
        """The next one may take it, this one, too."""
        self.registry = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _try_lock(self) -> bool:
        path = self._registry.folder / LOCK_FILE
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RegistryUnusableError(f"cannot use the drafter registry in {path.parent}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            return False
        self._lock = file
        return True
