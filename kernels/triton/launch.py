"""Where Triton's kernels run, and what every launch of them has in common.

Kernels keep to what Triton 3.6 to the newest have: no block pointers, no inline assembly, no libdevice, no autotuning.
With ``TRITON_INTERPRET=1`` in the environment, which has to be there before they are imported, they run on the CPU.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

log = logging.getLogger(__name__)
LEAST_CAPABILITY = 80


def is_interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device_type: str) -> bool:
    """Whether Triton is installed and runs kernels on such devices in this process."""
    return not why_not(device_type)


@cache
def why_not(device_type: str) -> str:
    """Why Triton runs no kernels on such devices in this process; empty where it does."""
    if find_spec("triton") is None:
        return "Triton is not installed (torch for CUDA brings it)"
    if is_interpreted():
        return "" if device_type == "cpu" else "this process runs them in the interpreter, on the CPU"
    return "there is no GPU" if device_type != "cuda" else too_old() or unable()


def too_old() -> str:
    """What Triton, and bfloat16 in matrix units, need and this process's GPU has not; empty where there is none."""
    if not torch.cuda.is_available() or (found := capability(torch.device("cuda"))) >= LEAST_CAPABILITY or not found:
        return ""
    return f"this GPU has compute capability {found / 10}, and {LEAST_CAPABILITY / 10} is needed"


def unable() -> str:
    """Why Triton starts no kernel on this process's GPU, as seen when one is started; empty where it does.

    It compiles a module of its own for that, and one for each way of calling a kernel, with the compiler of the system.
    """
    if not torch.cuda.is_available():
        return ""
    keep_kernels()
    try:
        from slipstream.kernels.triton.probe import start

        start()
    except Exception as error:
        log.warning("Triton starts no kernel here", exc_info=True)
        return f"it cannot start a kernel here: {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "it needs a C compiler for that, and there is none: install gcc, or name one in the variable CC"
    if isinstance(error, subprocess.CalledProcessError) and "-shared" in error.cmd:
        return (
            f"{error.cmd[0]} does not compile what it needs for that (its output is above): are Python's headers "
            "installed (python3-dev), and those of the C library (libc6-dev)?"
        )
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a message'])[-1]}"


def keep_kernels() -> None:
    """Has Triton keep compiled kernels in a temporary folder if it cannot write where it would, as in a read-only home.

    Other processes that this one starts later keep theirs there, too.
    """
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111  (as Triton, also without a home)
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton/cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
        log.warning("compiled kernels are kept in %s this time: %s", os.environ["TRITON_CACHE_DIR"], error)


@cache
def capability(device: torch.device) -> int:
    """Compute capability as one number, for example 90 for 9.0; 0 where there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
