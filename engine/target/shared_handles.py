"""Tensors that another process of this machine shares with torch: pickled handles, of which nothing is run.

A pickle says which functions rebuild its tensors. Here these are records of what they would be called with, and only
those below are known; then a handle is opened by name. Memory of CUDA is opened with torch's own function. Those paths
are not proven: they take a GPU.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.errors import ModelError
from slipstream.engine.target.sources import SHARED_MEMORY, read_segment

CUDA_DEVICE = 6
"""Place of the device's index among the arguments of ``rebuild_cuda_tensor``."""
FILE_HEADER_BYTES = 64
"""Before the numbers in a file that torch shares: who counts its users."""
PLAIN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "tuple"): tuple,
    ("builtins", "set"): set,
    ("builtins", "int"): int,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
}
STORAGES = {"FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage", "ByteStorage", "CharStorage"}


class _Record:
    """An object of a class that is not loaded: its attributes only."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _Handles(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (found := PLAIN.get((module, name))) is not None:
            return found
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module.startswith("torch") and (name in STORAGES or name in ("UntypedStorage", "TypedStorage", "Tensor")):
            return name
        if name in REBUILDS and module.startswith(("torch", "sglang")):
            return REBUILDS[name]
        if name in ("FlattenedTensorMetadata", "LocalSerializedTensor"):
            return _Record
        raise ModelError(f"shared tensors hold a {module}.{name}, which is not loaded")


def _storage_of_file(_: Any, __: Any, handle: bytes, size: int, *___: Any) -> torch.UntypedStorage:
    """Copied from a file in shared memory that torch's strategy ``file_system`` has made."""
    name = Path(handle.decode()).name
    if not (SHARED_MEMORY / name).is_file():
        raise ModelError(f"shared tensors lie in {name!r}, which is no shared memory of this machine")
    copied = read_segment(name, size, FILE_HEADER_BYTES)
    return torch.frombuffer(copied, dtype=torch.uint8).untyped_storage()


def _storage_of_descriptor(*_: Any) -> Any:
    raise ModelError(
        "shared tensors come as file descriptors, which only a process's own children can open: call "
        "torch.multiprocessing.set_sharing_strategy('file_system') in the trainer first"
    )


def _cpu_tensor(_: Any, storage: Any, metadata: Any, *__: Any) -> Tensor:
    offset, size, stride, *_rest = metadata
    dtype = next((each for each in _rest if isinstance(each, torch.dtype)), None)
    if isinstance(storage, tuple):  # of a storage that knows its number format
        storage, dtype = storage
    return _view(storage, dtype, offset, size, stride)


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype, *_: Any) -> tuple[torch.UntypedStorage, Any]:
    return storage, dtype


def _view(storage: Any, dtype: torch.dtype | None, offset: int, size: Any, stride: Any) -> Tensor:
    if not isinstance(storage, torch.UntypedStorage) or dtype is None:
        raise ModelError("a shared tensor has no storage, or no number format")
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(storage, offset, tuple(size), tuple(stride))


def _cuda_tensor(*arguments: Any) -> Tensor:
    if not torch.cuda.is_available():
        raise ModelError("shared tensors lie on a GPU, and this engine computes on the CPU")
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    given = list(arguments)
    given[0] = torch.Tensor
    storages = {"UntypedStorage": torch.UntypedStorage, "TypedStorage": torch.storage.TypedStorage}
    given[4] = storages.get(str(given[4]), torch.UntypedStorage)
    given[CUDA_DEVICE] = torch.cuda.current_device()
    return rebuild_cuda_tensor(*given)  # type: ignore[no-any-return,no-untyped-call]


REBUILDS: Mapping[str, Callable[..., Any]] = {
    "rebuild_tensor": _cpu_tensor,
    "rebuild_storage_filename": _storage_of_file,
    "rebuild_storage_fd": _storage_of_descriptor,
    "rebuild_typed_storage": _typed_storage,
    "rebuild_cuda_tensor": _cuda_tensor,
    "_rebuild_cuda_tensor_modified": _cuda_tensor,
}


def open_handles(pickled: bytes, names: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, which are valid while the sender keeps them.

    A pickle holds pairs of name and tensor, which may be pickled by itself, once for each device of a server; one flat
    tensor of bytes and what lies where in it; or, for ``names``, the function and arguments that rebuild each tensor,
    by the id of the GPU. Raises ModelError for anything else.
    """
    found = _load(pickled)
    names = tuple(names)
    if isinstance(found, Mapping) and "flattened_tensor" in found:
        yield from _split(found["flattened_tensor"], found.get("metadata"))
        return
    if isinstance(found, Mapping):
        found = list(found.items())
    if not isinstance(found, list | tuple) or (names and len(names) != len(found)):
        raise ModelError("the handles of shared tensors are no list of them, or not as many as their names")
    for at, entry in enumerate(found):
        name, tensor = (names[at], _by_device(entry)) if names else _pair(entry)
        if isinstance(tensor, _Record):
            tensor = _of_one_device(name, getattr(tensor, "values", None))
        if not isinstance(tensor, Tensor):
            raise ModelError(f"what is shared under the name {name!r} is no tensor")
        yield name, tensor


def _load(pickled: bytes) -> Any:
    try:
        return _Handles(BytesIO(pickled)).load()
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the handles of shared tensors cannot be read: {type(error).__name__}: {error}") from error


def _of_one_device(name: str, values: Any) -> Any:
    if not isinstance(values, list) or len(values) != 1 or not isinstance(values[0], bytes):
        raise ModelError(f"tensor {name!r} is not shared once, for the one device that this server has")
    return _load(values[0])


def _pair(entry: Any) -> tuple[str, Any]:
    if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], str):
        raise ModelError("the handles of shared tensors are no pairs of name and tensor")
    return entry[0], entry[1]


def _by_device(entry: Any) -> Any:
    if isinstance(entry, Mapping):
        here = _plain(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        by_id = {_plain(uuid): tensor for uuid, tensor in entry.items()}
        if here not in by_id:
            raise ModelError(f"a shared tensor lies on the GPUs {', '.join(by_id)}, not on {here}")
        entry = by_id[here]
    if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0]):
        return entry[0](*entry[1])
    return entry


def _plain(uuid: Any) -> str:
    """Before a GPU's id NVML writes this, and torch does not."""
    return str(uuid).removeprefix("GPU-")


def _split(flat: Any, metadata: Any) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(flat, Tensor) or not isinstance(metadata, list | tuple):
        raise ModelError("a flattened bucket has a flattened_tensor and the metadata of those in it")
    whole = flat.view(torch.uint8).flatten()
    for each in metadata:
        fields = each if isinstance(each, Mapping) else getattr(each, "__dict__", {})
        try:
            name, dtype, shape = fields["name"], fields["dtype"], tuple(fields["shape"])
            part = whole[fields["start_idx"] : fields["end_idx"]]
            yield name, part.clone().view(dtype).view(shape)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ModelError(f"the metadata of a flattened bucket does not fit it: {error}") from error
