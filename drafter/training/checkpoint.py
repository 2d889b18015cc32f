"""Checkpoints of training that do not hold it up: what is trained is copied, a thread writes it."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
MOST_CHARS = 150
"""A file's name has no more; file systems allow 255 bytes."""


class Checkpoint:
    """One file, replaced at once when a new one is complete. Frozen weights are not part of it, nor is the device.

    (Selective asynchronous checkpoints: TLT, arXiv:2511.16665.)
    """

    def __init__(self, folder: Path, name: str) -> None:
        """``name`` may be any text."""
        encoded = quote(name, safe="")
        if len(encoded) > MOST_CHARS:
            encoded = encoded[:MOST_CHARS] + "-" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        self._path = folder / f"{encoded}.pt"
        # A name of its own: where two processes train for one registry, neither writes into the other's file.
        self._draft = folder / f"{encoded}.{secrets.token_hex(4)}.tmp"
        self._writer: threading.Thread | None = None
        self.error: Exception | None = None
        """Why the last one could not be written."""

    def clean(self) -> None:
        """Removes what processes have left that were ended while they wrote."""
        name = glob.escape(self._path.stem)
        for left in (self._path.with_suffix(".tmp"), *self._path.parent.glob(f"{name}.*.tmp")):
            with suppress(OSError):
                left.unlink()

    def save(self, state: dict[str, Any], wait: bool = False) -> None:
        """Copies the state and writes it in the background; waits for the one before, or with ``wait`` for this."""
        self.finish()
        copied = _copy(state)
        self._writer = threading.Thread(target=self._write, args=(copied,), name="checkpoint")
        self._writer.start()
        if wait:
            self.finish()

    def load(self) -> dict[str, Any] | None:
        """The last complete one; None if there is none or it cannot be read."""
        try:
            state = torch.load(self._path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # what torch raises of a damaged file can be anything
            logger.warning(
                "going on without the checkpoint %s, which cannot be read: %s", self._path, type(error).__name__
            )
            return None
        return state if isinstance(state, dict) else None

    def finish(self) -> None:
        """Waits until nothing is being written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, state: dict[str, Any]) -> None:
        draft = self._draft
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
            if self.error is not None:
                logger.warning("training is saved again in %s", self._path)
            self.error = None
        except (OSError, RuntimeError) as raised:
            # Of a full disk torch says in a RuntimeError that positions do not fit, the system says what it is.
            error = raised.__context__ if isinstance(raised.__context__, OSError) else raised
            if self.error is None:
                logger.warning(
                    "training cannot be saved in %s, so a restart would lose what it has learned since the last time; "
                    "it goes on, and tries again: %s",
                    *(self._path, error),
                )
            self.error = error
            with suppress(OSError):
                draft.unlink(missing_ok=True)


def _copy(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value) for value in state)
    return state
