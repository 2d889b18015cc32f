"""The life of an update of the target's weights: begun, filled from any source, finished or given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.background import Background, done
from slipstream.engine.errors import ConfigError, ModelError, SupersededError
from slipstream.engine.memory import give_back_free
from slipstream.engine.models.loader import SPARE_BYTES, available_memory
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import (
    Digests,
    HostCopy,
    ReadableWeights,
    Weights,
    checksums,
    copy_missing,
    fill_sent,
    place_told,
    require_finite,
)
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    Checksums,
    ChecksumTarget,
    FillTarget,
    FillTargetHandles,
    FillTargetShared,
    FindSender,
    FinishTargetUpdate,
    JoinGroup,
    LeaveGroup,
    ReadTarget,
    ReadTensor,
    ReceiveTarget,
    TargetOperation,
    TargetUpdated,
    TensorRows,
    UpdateMode,
)
from slipstream.engine.target.groups import LEAVE_S, Empty, Group
from slipstream.engine.target.lora import plain_name
from slipstream.engine.target.parts import Arrival, Update
from slipstream.engine.target.senders import UNKNOWN, Presence, Roll, Senders, processes
from slipstream.engine.target.shared_handles import open_handles
from slipstream.engine.target.sources import (
    Tensors,
    lora_scale,
    read,
    read_segment,
    require_lora_scale,
    unpack,
)
from slipstream.engine.units import human_size
from slipstream.kernels.compute import PACKED
from slipstream.kernels.stored import Stored

PrepareUse = Callable[[Weights], Callable[[int, UpdateMode], None]]
"""Makes ready for weights, in the background; what it returns is called between two steps, with their version, and has
all that follows computed with them."""
DISCARDED = "the model's weights were discarded: wake the engine up, or finish an update first"
STALE_S = 1800.0
"""An update that nothing was heard of for so long is given up: whoever sent it has gone, and its memory is needed."""
MOST_READ_BYTES = 64 << 20


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
        self._update: Update | None = None
        self._base: ReadableWeights | None = None
        """What served before the LoRA that serves now."""
        self._groups: dict[str, Group] = {}
        self._joining: list[tuple[Group, Future[None]]] = []
        self._arrivals: list[Arrival] = []
        self._rolls: list[Roll] = []
        self.has_weights = True
        """Whether the model has any; it has none while they are discarded."""

    def operate(self, operation: TargetOperation) -> Future[Any]:
        """Raises ModelError for what the update under way does not allow."""
        match operation:
            case BeginTargetUpdate(version, mode, name):
                self._begin(version, mode, name)
            case FillTarget(version, tensors, first_rows):
                return self._fill(self._find(version), UNKNOWN, lambda: unpack(tensors), first_rows)
            case FillTargetShared(version, segment, num_bytes):
                update = self._find(version)
                return self._fill(update, UNKNOWN, lambda: unpack(bytes(read_segment(segment, num_bytes))))
            case FillTargetHandles(version, pickled, names):
                return self._fill(self._find(version), processes(pickled), lambda: open_handles(pickled, names))
            case ReadTarget(version, path, is_lora):
                return self._read(self._find(version), Path(path), is_lora)
            case ReceiveTarget():
                return self._receive(operation)
            case JoinGroup():
                return self._join(operation)
            case LeaveGroup(name):
                self._group(name).leave()
                del self._groups[name]
            case FinishTargetUpdate():
                return self._finish(self._find(operation.version), operation)
            case FindSender(version):
                return self._find_sender(self._find(version))
            case CancelTargetUpdate(version):
                self._give_up(self._find(version), "it was cancelled")
            case ChecksumTarget():
                weights, dtype = self._serving(), self._model.formats.numbers
                return self._background.start(lambda: partial(Checksums, checksums(weights, dtype)))
            case ReadTensor():
                return done(self._read_tensor(operation))
        return done(None)

    @property
    def is_waiting(self) -> bool:
        """Whether something may come at any time that ``poll`` has to look for."""
        return bool(self._arrivals or self._joining or self._rolls)

    def poll(self) -> None:
        """Takes what has come from other threads; called between two steps."""
        for group, told in list(self._joining):
            if group.joined.done():
                self._joining.remove((group, told))
                self._tell_joined(group, told)
        for arrival in list(self._arrivals):
            self._take(arrival)
        self._rolls = [roll for roll in self._rolls if not roll.look()]
        update = self._update
        if update is not None and time.perf_counter() - update.touched > STALE_S and not self._background.has_work:
            self._give_up(update, f"nothing was heard of it for {STALE_S:.0f} s")

    def discard(self, keep: bool) -> None:
        """The model has no weights from now on, until ``use`` gives it some; ``keep``: those that it has now."""
        self._base = HostCopy(self._base) if keep and self._base is not None else None
        if self.has_weights:
            self._model.forget()
        self.has_weights = False

    def use(self, weights: Weights, version: int, mode: UpdateMode, follow: Callable[[int, UpdateMode], None]) -> None:
        """Serves with these from now on; ``follow`` is what was prepared for them."""
        follow(version, mode)
        self.has_weights = True

    def close(self) -> None:
        for group in self._groups.values():
            group.leave(LEAVE_S)

    def _begin(self, version: int, mode: UpdateMode, name: str) -> None:
        if version < 1:
            raise ConfigError(f"a version of the target is a number from 1 on (0: those of its files), not {version}")
        if self._update is not None:
            self._give_up(self._update, f"an update to version {name or version} was begun instead")
        if self._device.type == "cuda":  # torch keeps what weights took that nobody has any more, until it is asked
            torch.cuda.empty_cache()
        needed, free = self._weights_bytes, available_memory(self._device)
        if free < needed + SPARE_BYTES:
            sizes = f"take {human_size(needed)} beside those that serve, and only {human_size(free)} of memory are free"
            raise ModelError(f"other weights {sizes}")
        formats = self._model.formats
        digests = Digests(formats.numbers) if formats.weights == PACKED else None
        self._update = Update(version, mode, name, self._model.new_weights(), digests)

    def _find(self, version: int) -> Update:
        update = self._update
        if update is None or update.version != version:
            what = "none" if update is None else f"one to version {update.name}"
            raise ModelError(f"no update to version {version} is under way, but {what}: begin it first")
        update.touched = time.perf_counter()
        return update

    def _find_sender(self, update: Update) -> Future[Presence]:
        if any(arrival.update is update for arrival in self._arrivals):
            return done(True)  # it is at it: where that breaks off the update fails
        roll = Roll(update.senders)
        if not roll.look():
            self._rolls.append(roll)
        return roll.told

    def _give_up(self, update: Update, why: str) -> None:
        update.end(why)
        self._update = None
        self._give_back()

    def _give_back(self) -> None:
        """Once what is under way has let go of them, gives the memory of weights that nobody has to the system."""

        def prepare() -> Callable[[], None]:
            give_back_free()
            return lambda: None

        self._background.start(prepare, key="give back")

    def _serving(self) -> Weights:
        if not self.has_weights:
            raise ModelError(DISCARDED)
        return self._model.weights

    # What comes ------------------------------------------------------------------------------------------------------

    def _fill(
        self,
        update: Update,
        senders: Senders,
        tensors: Callable[[], Tensors],
        first_rows: dict[str, int] | None = None,
    ) -> Future[int]:
        """How many tensors have not come completely then."""
        weights, lora, digests, firsts = update.weights, update.lora, update.digests, first_rows or {}

        def prepare() -> Callable[[], int]:
            try:
                for name, rows in tensors():
                    update.check()
                    update.came_from(name, senders)
                    if isinstance(rows, Tensor):
                        require_finite(name, rows)
                    if isinstance(rows, Stored) or not lora.take(name, rows):
                        fill_sent(weights, plain_name(name), rows, firsts.get(name))
                        if digests is not None and isinstance(rows, Tensor) and rows.dim() > 1:
                            digests.add(plain_name(name), rows, firsts.get(name, 0))
            except Exception as error:
                update.fail(str(error))
                raise
            missing = weights.num_missing
            return lambda: missing

        return self._background.start(prepare)

    def _read(self, update: Update, path: Path, is_lora: bool) -> Future[int]:
        lora = update.lora

        def tensors() -> Tensors:
            scale = require_lora_scale(path) if is_lora else lora_scale(path)
            lora.scale = lora.scale if scale is None else scale
            return read(path, self._model)

        return self._fill(update, UNKNOWN, tensors)

    def _receive(self, asked: ReceiveTarget) -> Future[int]:
        update, group = self._find(asked.version), self._group(asked.group)
        if not asked.tensors:
            return done(update.weights.num_missing)
        arrival = Arrival(update, frozenset({group}), group.receive(asked))
        self._arrivals.append(arrival)
        return arrival.done

    def _take(self, arrival: Arrival) -> None:
        """Has what came laid out, once what came before is; ends the arrival where nothing more comes."""
        last, update = arrival.laid_out, arrival.update
        if last is not None and not last.done():
            return
        try:
            missing = update.weights.num_missing if last is None else last.result()
            update.check()
            came = arrival.transfer.take()
            update.touched = time.perf_counter()
            if isinstance(came, Exception):
                update.fail(str(came))
                raise came
            if came is not None:
                arrival.laid_out = self._fill(update, arrival.senders, lambda: came)
                return
        except Empty:
            return
        except Exception as error:
            self._arrivals.remove(arrival)
            arrival.transfer.discard()
            arrival.done.set_exception(error)
        else:
            self._arrivals.remove(arrival)
            arrival.done.set_result(missing)

    # Groups ----------------------------------------------------------------------------------------------------------

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            known = ", ".join(map(repr, self._groups)) or "none"
            raise ModelError(f"there is no group {name!r} of processes, but {known}: join it first")
        return self._groups[name]

    def _join(self, asked: JoinGroup) -> Future[None]:
        group = Group(asked, self._device)
        if (before := self._groups.pop(asked.name, None)) is not None:
            before.leave()
        self._groups[asked.name] = group
        told: Future[None] = Future()
        self._joining.append((group, told))
        return told

    def _tell_joined(self, group: Group, told: Future[None]) -> None:
        if (error := group.joined.exception()) is None:
            told.set_result(None)
            return
        self._groups = {name: each for name, each in self._groups.items() if each is not group}
        told.set_exception(error)

    # The end ---------------------------------------------------------------------------------------------------------

    def _finish(self, update: Update, asked: FinishTargetUpdate) -> Future[TargetUpdated]:
        weights, lora = update.weights, update.lora
        base: ReadableWeights | None = None
        if lora:
            base = self._base or self._serving()
        elif asked.keep_rest and self.has_weights:
            base = self._model.weights

        def prepare() -> Callable[[], TargetUpdated]:
            update.check()
            if base is None and asked.keep_rest and weights.num_missing:
                raise ModelError(DISCARDED)
            if base is not None:
                if lora:
                    for name, rows, first in lora.merged(base, asked.lora_scale):
                        weights.fill(name, rows, first, exact=True)  # packed again, little would be left of it
                copy_missing(weights, base)
            weights.check_complete()
            self._compare(update, weights, asked.checksums)
            follow = self._prepare_use(weights)
            return lambda: self._land(update, weights, base if lora else None, follow)

        return self._background.start(prepare)

    def _compare(self, update: Update, weights: Weights, expected: dict[str, str]) -> None:
        if not expected:
            return
        places = {name: place_told(weights, name) for name in expected}
        sizes = {name: place.shape(weights.shapes) or (0,) for name, place in places.items() if place.names}
        known = {}
        if update.digests is not None:
            known = {name: update.digests.of(name, size[0]) for name, size in sizes.items()}
        read = [name for name in sizes if known.get(name) is None]
        found = known | checksums(weights, self._model.formats.numbers, read)
        if wrong := [name for name in sizes if found.get(name) != expected[name]]:
            some = ", ".join(sorted(wrong)[:3])
            raise ModelError(f"{len(wrong)} tensors are not those whose checksums were told, for example {some}")

    def _land(
        self, update: Update, weights: Weights, base: ReadableWeights | None, follow: Callable[[int, UpdateMode], None]
    ) -> TargetUpdated:
        if self._update is not update:
            raise SupersededError(f"the update to version {update.name} was given up: {update.failure}")
        began = time.perf_counter()
        self.use(weights, update.version, update.mode, follow)
        update.end("it serves already")  # what comes late must not be laid into weights that serve
        self._update, self._base = None, base
        self._give_back()
        return TargetUpdated(update.version, began - update.began, time.perf_counter() - began)

    def _read_tensor(self, asked: ReadTensor) -> TensorRows:
        weights = self._serving()
        place = place_told(weights, asked.name)
        shape = place.shape(weights.shapes)
        if shape is None:
            raise ModelError(f"the model has no tensor {asked.name!r}")
        if not 0 <= asked.first_row < shape[0] or asked.rows < 1:
            raise ModelError(f"tensor {asked.name!r} has {shape[0]} rows, none of which was asked for")
        count = min(asked.rows, shape[0] - asked.first_row)
        most = MOST_READ_BYTES // (4 * max(torch.Size(shape[1:]).numel(), 1))
        if count > most:
            raise ModelError(f"{count} rows of {asked.name!r} are too many to be read at once: ask for {most} at most")
        if place.per_row:
            names = place.of_rows(asked.first_row, count)
            read = [weights.read(name, 0, weights.shapes[name][0]) for name in names]
        else:
            read = [weights.read(place.names[0], asked.first_row, count)]
        rows = torch.cat([part.to("cpu", torch.float32) for part in read])
        return TensorRows(shape, rows.numpy().tobytes())
