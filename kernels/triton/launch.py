"""Where Triton's kernels run, and what every launch of them has in common.

Kernels keep to what Triton 3.6 to the newest have: no block pointers, no inline assembly, no libdevice, no autotuning.
With ``TRITON_INTERPRET=1`` in the environment, which has to be there before they are imported, they run on the CPU.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

LEAST_CAPABILITY = 80


def is_interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def runs_on(device_type: str) -> bool:
    """Whether Triton is installed and runs kernels on such devices in this process."""
    if find_spec("triton") is None:
        return False
    return device_type == "cpu" if is_interpreted() else device_type == "cuda" and not too_old()


def too_old() -> str:
    """What Triton, and bfloat16 in matrix units, need and this process's GPU has not; empty where there is none."""
    if not torch.cuda.is_available() or (found := capability(torch.device("cuda"))) >= LEAST_CAPABILITY or not found:
        return ""
    return f"this GPU has compute capability {found / 10}, and {LEAST_CAPABILITY / 10} is needed"


@cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, for example 90 for 9.0; 0 where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
