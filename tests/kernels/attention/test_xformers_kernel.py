"""xFormers' own kernel, in Triton's interpreter: what it makes of our masks and tables is what the formula does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_peers import XFORMERS

HERE = Path(__file__).parent
COMPUTE = """
import logging, sys
sys.path[:0] = [sys.argv[1]]
logging.disable(logging.WARNING)
import bf16_interpreter, torch
from test_backends import attended, check, ours, ragged
from xformers.ops.fmha import triton_splitk
triton_splitk.FwOp.SUPPORTED_DEVICES = {"cuda", "cpu"}
backend = ours.Backend()
for asked in ([(1, 19), (1, 36), (1, 0)], [(5, 15), (5, 40)], [(1, 19), (4, 30), (3, 61)], [(40, 3), (1, 50)]):
    # Not in bfloat16, which it refuses where it sees no GPU that has it.
    check(*attended(backend, *ragged(asked), (4, 2, 64), torch.float16))
print("done")
"""


@pytest.mark.slow
def test_it_computes_the_formula(request: pytest.FixtureRequest) -> None:
    """The wheel is downloaded once; where that cannot be, there is nothing to test."""
    [version] = XFORMERS
    folder = Path(request.config.cache.mkdir(version))  # type: ignore[union-attr]
    if not (folder / "xformers").is_dir():
        package = "==".join(version.rsplit("-", 1))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), package]
        got = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        if got.returncode:
            pytest.skip(f"{package} cannot be had: {got.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join([str(HERE), str(HERE.parent / "triton")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "XFORMERS_ENABLE_TRITON": "1", "PYTHONPATH": path}
    command = [sys.executable, "-P", "-c", COMPUTE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.stdout.strip().endswith("done"), done.stderr
