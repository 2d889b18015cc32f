"""A graph on the CPU: what CUDA would record of a piece of work, and refuse to, without a GPU.

Torch's operations and launches of kernels are kept with the memory they work on, and done again by ``replay`` in that
memory. What capture forbids raises: waiting for the device, tensors made from numbers of the host, results whose shape
depends on data. ``trace`` has every operation with its shapes, numbers and, where memory was there before, its address:
two recordings of the same work must have the same one, or a number of the host was baked into one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "it reads a number",
    aten.nonzero.default: "its result has as many rows as data says",
    aten.masked_select.default: "its result has as many rows as data says",
    aten.repeat_interleave.Tensor: "its result has as many rows as data says",
    aten.equal.default: "it reads whether tensors are equal",
    aten.lift_fresh.default: "it makes a tensor of numbers of the host",
    aten.lift_fresh_copy.default: "it makes a tensor of numbers of the host",
}
READS = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.item}
MAKES = {torch.from_numpy, torch.tensor, torch.as_tensor}


class NotRecordedError(RuntimeError):
    """CUDA would refuse to record this."""


class HostTraffic(TorchFunctionMode):
    """Counts what would be copies between host and device, one for each call, if the device were another one.

    Whoever copies memory without waiting for it sends it, and whoever moves a tensor so fetches it: within a
    device there is nothing to wait for.
    """

    def __init__(self, allowed: bool = True) -> None:
        super().__init__()
        self.to_device = self.to_host = 0
        self.waits = 0
        """Copies to the host that hold it up until the device is idle."""
        self._on_host: list[Tensor] = []
        self._allowed = allowed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS or function in MAKES:
            if not self._allowed:
                raise NotRecordedError(f"{getattr(function, '__name__', function)} inside of recorded work")
            is_there = function in READS and any(args[0] is each for each in self._on_host)
            self.to_host += function in READS and not is_there
            self.waits += function in READS and not is_there
            self.to_device += function in MAKES
        elif function is Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            self.to_device += 1
        elif function is Tensor.to and (kwargs or {}).get("non_blocking"):
            self.to_host += 1
            self._on_host.append(args[0].clone())
            return self._on_host[-1]
        elif function is Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            self.to_device += 1  # numpy's arrays become tensors unseen, and then go there
        return function(*args, **(kwargs or {}))


class RecordedGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.trace: list[Any] = []
        self._steps: list[tuple[Callable[..., Any], Any, Any, list[Tensor]]] = []
        """What is called with what, and the tensors that its results go to."""
        self._made: set[int] = set()
        self._alive: list[Any] = []

    def record(self, work: Callable[[], Any]) -> Any:
        with self._launches_kept(), HostTraffic(allowed=False), self:
            return work()

    def replay(self) -> None:
        for function, args, kwargs, results in self._steps:
            done = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
            for result, value in zip(results, done if results else [], strict=True):
                result.copy_(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in WAITS:
            raise NotRecordedError(f"{function}: {WAITS[function]}")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if function in (aten.index.Tensor, aten.index_put_.default) and any(x.dtype is torch.bool for x in given[1:]):
            raise NotRecordedError(f"{function}: a mask as index has as many rows as data says")
        self.trace.append((str(function), *map(self._key, tree_leaves((args, kwargs)))))
        out = function(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        where = {x.untyped_storage().data_ptr() for x in given}
        is_new = any(x.untyped_storage().data_ptr() not in where for x in results)
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in function._schema.arguments)
        if is_new and not writes:
            self._made |= {x.untyped_storage().data_ptr() for x in results}
            self._alive.append(results)  # or later memory may get the same address
            self._steps.append((function, args, kwargs, results))
        elif writes:
            self._steps.append((function, args, kwargs, []))
        return out

    @contextmanager
    def _launches_kept(self) -> Iterator[None]:
        """Launches of Triton's kernels are kept, too, and what they do inside is not."""
        launch = interpreter.GridExecutor.__call__

        def kept(executor: Any, *args: Any, **kwargs: Any) -> None:
            name = executor.fn.__name__
            self.trace.append((name, tuple(executor.grid), *map(self._key, [*args, *kwargs.values()])))
            self._steps.append((launch, (executor, *args), kwargs, []))
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                launch(executor, *args, **kwargs)

        interpreter.GridExecutor.__call__ = kept
        try:
            yield
        finally:
            interpreter.GridExecutor.__call__ = launch

    def _key(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_own = value.untyped_storage().data_ptr() in self._made
        return (None if is_own else value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
