"""How tests of weights ask a server, and send it some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from slipstream.clients.adapters.group import TrainerGroup
from tests.ports import free_port

PROMPT = [504, 2365, 6354, 16438]
Weights = dict[str, Tensor]


def with_weights(model: Path, folder: Path, weights: Weights) -> Path:
    """The model with other weights, in a new folder."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors")
    return folder


def post(server: Any, path: str, body: Any = None, *, status: int = 200) -> Any:
    found, reply = server.post(path, {} if body is None else body)
    assert found == status, reply
    return reply


def say(server: Any) -> Any:
    return server.complete(PROMPT, max_tokens=8, temperature=0)["choices"]


def info(weights: Weights) -> dict[str, Any]:
    return {
        "names": list(weights),
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
    }


def join(server: Any, packed: bool) -> TrainerGroup:
    port = free_port()
    told = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "packed": packed}
    with ThreadPoolExecutor(1) as beside:
        joining = beside.submit(post, server, "/init_weight_transfer_engine", {"init_info": told})
        group = TrainerGroup("127.0.0.1", port, 2, timeout_s=300)
        assert joining.result(300) == {"message": "Weight transfer initialized"}
    return group


@contextmanager
def beside(function: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """The other side of a call."""
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(function, *arguments)
        yield
        other.result(300)


def named_group(port: int, name: str) -> Any:
    """Rank 0 of a group as AReaL makes one."""
    store: Any = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=True)
    for prefix in (name, f"{name}/", "cpu/"):
        store = torch.distributed.PrefixStore(prefix, store)
    return torch.distributed.ProcessGroupGloo(store, 0, 2)


def broadcast(group: Any, tensor: Tensor) -> None:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()


def send_shared(server: Any, weights: Weights) -> None:
    data = save({name: tensor.contiguous() for name, tensor in weights.items()})
    segment = shared_memory.SharedMemory(create=True, size=len(data))
    try:
        segment.buf[: len(data)] = data
        post(server, "/update_weights", {"update_info": {"shared_memory": segment.name, "num_bytes": len(data)}})
    finally:
        segment.close()
        segment.unlink()
