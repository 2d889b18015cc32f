"""LoRAs beside the model's weights: which there are, by the names that requests have for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from weakref import ref

import msgspec
import torch
from torch import Tensor

from slipstream.engine.background import Background, breathe, done
from slipstream.engine.errors import ModelError
from slipstream.engine.models.loader import SPARE_BYTES, available_memory
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import require_finite
from slipstream.engine.operations import AdapterOperation, LoadAdapter, LoadSharedAdapter
from slipstream.engine.plan import PLAIN, LoadedAdapter
from slipstream.engine.target.lora import Lora, LoraScale, scale_of
from slipstream.engine.target.shared_handles import open_handles
from slipstream.engine.target.sources import LORA_TENSORS, Tensors, read_lora, require_lora_scale
from slipstream.engine.units import human_size
from slipstream.kernels.adapter import Adapter

COPIES = 4
"""What one takes at most while it is loaded, as a multiple of its file: that may be bfloat16, of which float32 is made
first, and then what kernels want, which is filled up where ranks are small."""


class Adapters:
    """All methods are for the thread of the steps."""

    def __init__(self, model: CausalModel, device: torch.device, background: Background) -> None:
        self._model, self._device = model, device
        self._background = background
        self._named: dict[str, LoadedAdapter] = {}
        self._all: list[tuple[Adapter, ref[LoadedAdapter]] | None] = []
        """By number, from 1 on, with what its name and its requests hold; None where neither are left."""
        self._loads = 0

    def find(self, name: str) -> LoadedAdapter | None:
        """The one that requests of this name get now."""
        return self._named.get(name) if name else PLAIN

    def operate(self, operation: AdapterOperation) -> Future[None]:
        """Raises ModelError for one that is not there, or cannot be."""
        match operation:
            case LoadAdapter(name, path):
                return self._load(name, path, lambda: self._of_folder(Path(path)))
            case LoadSharedAdapter(name, config, pickled):
                told = f"the LoRA {name!r} whose matrices are shared"
                return self._load(name, told, lambda: self._of_handles(told, config, pickled))
        if self._named.pop(operation.name, None) is None:
            raise ModelError(f"there is no LoRA {operation.name!r}, but {', '.join(map(repr, self._named)) or 'none'}")
        self._forget_unused()
        self._use()
        return done(None)

    def _of_folder(self, path: Path) -> tuple[LoraScale, Tensors]:
        """What its matrices are multiplied with, and these."""
        scale = require_lora_scale(path)
        with suppress(OSError):  # reading it says what is wrong
            self._require_room((path / LORA_TENSORS).stat().st_size)
        return scale, read_lora(path)

    def _of_handles(self, told: str, config: bytes, pickled: bytes) -> tuple[LoraScale, Tensors]:
        scale, tensors = scale_of(msgspec.json.decode(config), told), list(open_handles(pickled))
        self._require_room(sum(tensor.nbytes for _, tensor in tensors))
        return scale, tensors

    def _load(self, name: str, told: str, find: Callable[[], tuple[LoraScale, Tensors]]) -> Future[None]:
        """``told``: where it comes from, for errors; ``find`` its scale and matrices, in the background."""
        model = self._model
        if not name:
            raise ModelError("a LoRA needs a name")

        def prepare() -> Callable[[], None]:
            (scale, tensors), lora = find(), Lora()
            for tensor_name, tensor in tensors:
                breathe()
                if isinstance(tensor, Tensor):
                    require_finite(tensor_name, tensor)
                if not isinstance(tensor, Tensor) or not lora.take(tensor_name, tensor):
                    raise ModelError(
                        f"{told}: {tensor_name!r} is no matrix of a LoRA; what was trained whole (modules_to_save, "
                        "embeddings of new tokens) cannot be beside the model"
                    )
            if not lora:
                raise ModelError(f"{told} holds no matrices of a LoRA")
            pairs = dict(lora.pairs(model.weight_shapes, scale))
            try:
                adapter = model.adapter(pairs)
            except torch.OutOfMemoryError:
                raise ModelError(
                    f"{told}: there is no memory left for it on the device; unload another LoRA first, or start the "
                    "server with a smaller --gpu-memory-utilization"
                ) from None
            return lambda: self._add(name, adapter)

        return self._background.start(prepare)

    def _require_room(self, size: int) -> None:
        """For one of so many bytes. Raises ModelError: whoever loads ever new names, and unloads none, is to be told
        before memory is gone.
        """
        needed, free = COPIES * size, available_memory(self._device)
        if free < needed + SPARE_BYTES:
            raise ModelError(
                f"there is no room for another LoRA: it may take {human_size(needed)}, and {human_size(free)} of "
                f"memory are free, of which {human_size(SPARE_BYTES)} are spared; unload some of the "
                f"{len(self._named)} that there are"
            )

    def _add(self, name: str, adapter: Adapter) -> None:
        self._named.pop(name, None)
        self._forget_unused()
        if None not in self._all:
            self._all.append(None)
        at = self._all.index(None)
        self._loads += 1
        self._named[name] = LoadedAdapter(at + 1, f"{name}#{self._loads}")
        self._all[at] = adapter, ref(self._named[name])
        self._use()

    def _forget_unused(self) -> None:
        """Those that have no name any more, and no request."""
        self._all = [None if each is None or each[1]() is None else each for each in self._all]

    def _use(self) -> None:
        self._model.use_adapters([each and each[0] for each in self._all])
