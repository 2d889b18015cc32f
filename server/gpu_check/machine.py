"""What is checked: the device, its driver, and the versions of everything that computes on it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from slipstream.engine.limits import usable_cores
from slipstream.server.gpu_check.context import Context, Part
from slipstream.server.gpu_check.report import Cell

PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "xformers", "vllm", "sglang", "numpy")


def parts(context: Context) -> Iterator[Part]:
    yield Part("device and versions", lambda: context.machine(describe(context)))


def describe(context: Context) -> dict[str, Cell]:
    """Without "device" where there is none."""
    facts: dict[str, Cell] = {}
    if context.dry_run:
        facts["device"] = f"CPU: {processor()}"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        facts["device"] = device.name
        facts["capability"] = f"{device.major}.{device.minor}, {device.multi_processor_count} multiprocessors"
        facts["memory"] = f"{device.total_memory / 2**30:.1f} GiB"
        facts["driver"] = driver()
        facts["CUDA of torch"] = torch.version.cuda or f"HIP {torch.version.hip}"
    facts["host"] = f"{processor()}, {usable_cores()} usable of {os.cpu_count()} cores, {platform.platform()}"
    facts["python"] = platform.python_version()
    return facts | {name: found for name in PACKAGES if (found := installed(name))}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def driver() -> str:
    asked = ["nvidia-smi", "-i", "0", "--format=csv,noheader", "--query-gpu=driver_version,power.limit,clocks.max.sm"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        return found + " (driver, power limit, highest clock)"
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
