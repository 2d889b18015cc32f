"""The smallest kernel there is, to see whether kernels start."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_one(out):
    tl.store(out, 1)


def start() -> None:
    """Raises whatever keeps kernels from starting on this process's GPU."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    write_one[(1,)](out)
    if out.item() != 1:
        raise RuntimeError(f"a kernel that writes 1 left {out.item()}")
