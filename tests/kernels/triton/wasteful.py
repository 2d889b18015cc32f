"""Kernels that ask for too much of sm_90, run by ``test_compiled.py``: prints what is wrong with each as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
sys.path.insert(0, str(Path(__file__).parent))  # which `make` keeps out

import torch
import triton
import triton.language as tl
from fake_driver import TARGETS, Compiled, compile_for
from kernel_resources import problem


@triton.jit
def product(a, b, out, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        at = start + inner
        left = tl.load(a + row[:, None] * k + at[None, :])
        right = tl.load(b + column[None, :] * k + at[:, None])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * N + column[None, :], total)


def main() -> None:
    target = TARGETS["sm_90"]
    compile_for(target)
    compiled = Compiled(target, __name__)
    a, b = (torch.empty(256, 512, dtype=torch.bfloat16) for _ in range(2))
    found = {}
    for name, tile, options in (
        ("modest", (64, 64, 64), {"num_warps": 4, "num_stages": 3}),
        ("spills", (128, 256, 64), {"num_warps": 4, "num_stages": 2}),
        ("shared", (128, 128, 128), {"num_warps": 8, "num_stages": 5}),
    ):
        product[(1,)](a, b, torch.empty(256, 256), 512, *tile, **options)
        found[name] = [problem(each, target) for each in compiled.new()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
