"""Where the tensors of an update of the weights come from.

Each is a function that makes, for the number of an update, the operation by which the engine takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from slipstream.engine.operations import (
    FillTarget,
    FillTargetHandles,
    FillTargetShared,
    Operation,
    ReadTarget,
    ReceiveTarget,
    TensorSpec,
)

Source = Callable[[int], Operation[int]]


def from_bytes(tensors: bytes, first_rows: dict[str, int] | None = None) -> Source:
    """A safetensors file that was sent; see FillTarget."""
    return lambda number: FillTarget(number, tensors, first_rows or {})


def from_disk(path: str, is_lora: bool = False) -> Source:
    """A folder or file of the engine's machine: a whole model, or a LoRA. ``is_lora``: nothing but a LoRA is meant."""
    return lambda number: ReadTarget(number, path, is_lora)


def from_shared_memory(segment: str, num_bytes: int) -> Source:
    """A shared-memory segment on the engine's machine; see FillTargetShared."""
    return lambda number: FillTargetShared(number, segment, num_bytes)


def from_handles(pickled: bytes, names: Collection[str] = ()) -> Source:
    """Tensors that another process of the engine's machine shares; see FillTargetHandles."""
    return lambda number: FillTargetHandles(number, pickled, tuple(names))


def from_group(
    group: str,
    tensors: Iterable[tuple[str, str, Iterable[int]]],
    buffer_bytes: int | None = None,
    barrier: bool = False,
) -> Source:
    """What a trainer broadcasts: name, number format and shape of each tensor; see ReceiveTarget."""
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in tensors)
    return lambda number: ReceiveTarget(number, group, specs, buffer_bytes, barrier)
