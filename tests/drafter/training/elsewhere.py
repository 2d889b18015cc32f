"""A device that is not the CPU, where there is none: it computes on the CPU, and forbids what a GPU forbids.

Tensors there are of torch's device ``meta``, which needs no hardware, and hold a tensor of the CPU. An operation with
tensors of both sides is an error, unless it copies, and so is reading one of them as an array. What is computed is to
the bit what the CPU computes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
aten: Any = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)


class WrongDeviceError(Exception):
    pass


# What torch's pytree does, for what operations are given and give; it takes longer than the operations.


def leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves_of(each)
    elif isinstance(value, dict):
        yield from leaves_of(tuple(value.values()))
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {name: mapped(change, each) for name, each in value.items()}
    return change(value)


class There(Tensor):
    """A tensor of that device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise WrongDeviceError(f"{func} outside of {Elsewhere.__name__}")


class Elsewhere(TorchDispatchMode):
    """Inside, there is the device. Counts what crosses, and what lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Tensor] = []
        """What came from the CPU, in order."""
        self.read: Counter[str] = Counter()
        """How often something was read back, by what is read: the host waits for the device."""
        self._alive: dict[int, int] = {}
        self.most_bytes = 0
        """The most that lay there at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in leaves if isinstance(each, There)]
        here = [each for each in leaves if not isinstance(each, There)]
        asked = kwargs.get("device")
        is_for = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
        if there and any(each.dim() for each in here) and func not in COPIES:
            raise WrongDeviceError(f"{func}: tensors of both devices: {[tuple(each.shape) for each in leaves]}")
        if func is aten.copy_.default:
            is_for = isinstance(args[0], There)
        given, named = mapped(_inner, args), mapped(_inner, kwargs)
        if asked is not None:
            named["device"] = torch.device("cpu")
        found = func(*given, **named)
        self._count(func, there, here, is_for)
        if not is_for:
            # A real copy, since it would be one.
            return found.clone() if func is aten._to_copy.default and there else found
        with torch.inference_mode(False):  # a view of a tensor from before is none of that mode's
            wrapped = mapped(lambda each: self._wrap(each) if isinstance(each, Tensor) else each, found)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped

    def _count(self, func: Any, there: list[There], here: list[Tensor], is_for: bool) -> None:
        if is_for and here and func in COPIES:
            self.sent.extend(here)
        elif there and (not is_for or func is aten._local_scalar_dense.default):
            self.read[str(func)] += 1

    def _wrap(self, inner: Tensor) -> There:
        storage = inner.untyped_storage()
        if storage.data_ptr() not in self._alive and storage.nbytes():
            key = storage.data_ptr()
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key, None)
            self.most_bytes = max(self.most_bytes, sum(self._alive.values()))
        return There(inner)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value
