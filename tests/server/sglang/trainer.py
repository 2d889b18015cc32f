"""The trainer's side of a process group, as slime makes one: rank 0, which broadcasts tensors of a safetensors file.

Run as a process of its own with a port, the name of the group and the file. Each line of its input is a JSON list of
names, which it broadcasts in this order; it answers each with a line.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous


def make_group(port: int, name: str) -> Any:
    """A group that is not the default one, with the store of ``init_process_group`` under the group's name."""
    timeout = timedelta(seconds=600)
    store, rank, world_size = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world_size, rank, [], dist.Backend("gloo"), dist.PrefixStore(name, store), group_name=name, timeout=timeout
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    return group


def main() -> None:
    port, name, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    tensors = load_file(file)
    group = make_group(port, name)
    print("joined", flush=True)
    for line in sys.stdin:
        for tensor in json.loads(line):
            dist.broadcast(tensors[tensor], 0, group=group)
        print("sent", flush=True)


if __name__ == "__main__":
    main()
