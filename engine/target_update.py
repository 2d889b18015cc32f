"""The life of an update of the target's weights: begun, filled from any source, finished or given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slipstream.engine.background import Background, done
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.safetensors_files import read_header, read_tensors
from slipstream.engine.errors import ConfigError, ModelError, SupersededError
from slipstream.engine.models.loader import SPARE_BYTES, available_memory, human_size
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import Weights
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    ReadTarget,
    TargetOperation,
    TargetUpdated,
    UpdateMode,
)

PrepareUse = Callable[[Weights], Callable[[int, UpdateMode], None]]
"""Makes ready for weights, in the background; what it returns is called between two steps, with their version, and has
all that follows computed with them."""


class _Update:
    def __init__(self, version: int, mode: UpdateMode, weights: Weights) -> None:
        self.version, self.mode, self.weights = version, mode, weights
        self.began = time.perf_counter()
        self.failure = ""
        """Why it cannot be finished any more."""

    def check(self) -> None:
        if self.failure:
            raise ModelError(f"the update to version {self.version} cannot be finished: {self.failure}")


class TargetUpdates:
    """One at a time. New weights lie beside the old ones until they are complete, so that memory is needed for both."""

    def __init__(
        self,
        model: CausalModel,
        device: torch.device,
        weights_bytes: int,
        background: Background,
        prepare_use: PrepareUse,
    ) -> None:
        """``weights_bytes`` are what the model's weights take. All methods are for the thread of the steps."""
        self._model, self._device, self._weights_bytes = model, device, weights_bytes
        self._background, self._prepare_use = background, prepare_use
        self._update: _Update | None = None

    def operate(self, operation: TargetOperation) -> Future[Any]:
        """Raises ModelError for what the update under way does not allow."""
        match operation:
            case BeginTargetUpdate(version, mode):
                self._begin(version, mode)
            case FillTarget(version, tensors, first_rows):
                return self._fill(version, lambda: _unpack(tensors), first_rows)
            case ReadTarget(version, path):
                return self._fill(version, lambda: self._read(Path(path)), {})
            case FinishTargetUpdate(version):
                return self._finish(self._find(version))
            case CancelTargetUpdate(version):
                self._give_up(self._find(version), "it was cancelled")
        return done(None)

    def _begin(self, version: int, mode: UpdateMode) -> None:
        if version < 1:
            raise ConfigError(f"a version of the target is a number from 1 on (0: those of its files), not {version}")
        if self._update is not None:
            self._give_up(self._update, f"an update to version {version} was begun instead")
        needed, free = self._weights_bytes, available_memory(self._device)
        if free < needed + SPARE_BYTES:
            sizes = f"take {human_size(needed)} beside those that serve, and only {human_size(free)} of memory are free"
            raise ModelError(f"other weights {sizes}")
        self._update = _Update(version, mode, self._model.new_weights())

    def _find(self, version: int) -> _Update:
        if self._update is None or self._update.version != version:
            what = "none" if self._update is None else f"one to version {self._update.version}"
            raise ModelError(f"no update to version {version} is under way, but {what}: begin it first")
        return self._update

    def _give_up(self, update: _Update, why: str) -> None:
        update.failure, self._update = why, None

    def _fill(
        self, version: int, read: Callable[[], Iterable[tuple[str, Tensor]]], first_rows: dict[str, int]
    ) -> Future[Any]:
        update = self._find(version)
        update.check()

        def prepare() -> Callable[[], None]:
            try:
                for name, rows in read():
                    update.check()
                    update.weights.fill(name, rows, first_rows.get(name))
            except Exception as error:
                update.failure = update.failure or str(error)
                raise
            return _nothing

        return self._background.start(prepare)

    def _finish(self, update: _Update) -> Future[TargetUpdated]:
        update.check()

        def prepare() -> Callable[[], TargetUpdated]:
            update.check()
            update.weights.check_complete()
            use = self._prepare_use(update.weights)
            return lambda: self._use(update, use)

        return self._background.start(prepare)

    def _use(self, update: _Update, use: Callable[[int, UpdateMode], None]) -> TargetUpdated:
        if self._update is not update:
            raise SupersededError(f"the update to version {update.version} was given up: {update.failure}")
        began = time.perf_counter()
        use(update.version, update.mode)
        self._update = None
        return TargetUpdated(update.version, began - update.began, time.perf_counter() - began)

    def _read(self, path: Path) -> Iterable[tuple[str, Tensor]]:
        if path.suffix.lower() == ".safetensors":
            return read_tensors(read_header(path))
        return self._model.tensors(open_checkpoint(path))


def _unpack(tensors: bytes) -> Iterable[tuple[str, Tensor]]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load(tensors)
        return found.items()
    except SafetensorError as error:
        raise ModelError(f"the tensors of an update are no safetensors file: {error}") from error


def _nothing() -> None:
    pass
