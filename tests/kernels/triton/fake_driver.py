"""A driver for Triton that has no device: every launch is compiled for a GPU that is named, and nothing runs.

It stands where Triton looks for its driver, so that kernels are specialised by the arguments of real calls. What has
been compiled tells which registers and how much memory it takes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU to compile for."""

    name: str
    target: GPUTarget
    shared: int
    """Most bytes of shared memory of a program."""
    spills_are_errors: bool

    @property
    def capability(self) -> int:
        """As ``launch.capability`` says it."""
        return int(self.target.arch) if self.target.backend == "cuda" else 0


TARGETS = {
    each.name: each
    for each in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, False),
        Target("sm_89", GPUTarget("cuda", 89, 32), 99 << 10, False),
        Target("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, True),
        Target("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, True),
        Target("sm_120", GPUTarget("cuda", 120, 32), 99 << 10, False),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, False),
    )
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor."""

    kernel: str
    registers: int
    """Per thread."""
    spills: int
    """Bytes that are stored because registers do not suffice; on AMD, registers."""
    shared: int
    warps: int
    stages: int


class FakeDriver:
    """What Triton asks of a driver."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @property
    def utils(self) -> Any:
        # As much shared memory as anybody wants: what is too much is found out for all kernels, not for the first.
        properties = {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
        properties |= {"sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1}
        return SimpleNamespace(
            load_binary=lambda name, data, shared, device: (None, 0, 0, 0, 1024),
            get_device_properties=lambda device: properties,
        )

    @property
    def launcher_cls(self) -> Any:
        return lambda source, metadata: lambda *args, **options: None


def compile_for(target: Target) -> None:
    """Every launch of this process is compiled for this target from now on; once and for all."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels that are interpreted compile nothing"
    driver.set_active(FakeDriver(target))


def functions(package: str) -> list[JITFunction[Any]]:
    """Triton's functions in the modules of a package, as far as these are imported."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(package)]
    found = {id(each): each for module in modules for each in vars(module).values() if isinstance(each, JITFunction)}
    return list(found.values())


class Compiled:
    """What the launches of a package's kernels have compiled."""

    def __init__(self, target: Target, package: str) -> None:
        self._target, self._package = target, package
        self._known: set[int] = set()

    def new(self) -> Iterator[Resources]:
        """What was compiled since it was asked last."""
        for function in functions(self._package):
            for kernel in function.device_caches[0][0].values() if 0 in function.device_caches else ():
                if id(kernel) not in self._known:
                    self._known.add(id(kernel))
                    yield resources(kernel, self._target)


def resources(kernel: Any, target: Target) -> Resources:
    registers, spills = (_amd if target.target.backend == "hip" else _nvidia)(kernel, target)
    made = kernel.metadata
    return Resources(kernel.name, registers, spills, made.shared, made.num_warps, made.num_stages)


def _nvidia(kernel: Any, target: Target) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        used = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", str(cubin)))
        assert used, "cuobjdump does not say which registers a kernel takes"
        if used[2] == "0":  # spilled registers would lie there
            return int(used[1]), 0
        ptx.write_text(kernel.asm["ptx"])
        assembler = "ptxas-blackwell" if target.capability >= 100 else "ptxas"
        name = re.search(r"\.target (\S+)", kernel.asm["ptx"])
        assert name
        said = _run(assembler, "-v", f"--gpu-name={name[1]}", str(ptx), "-o", os.devnull)
        spilled = re.search(r"(\d+) bytes spill stores", said)
        assert spilled, f"{assembler} does not say what it spills"
        return int(used[1]), int(spilled[1])


def _amd(kernel: Any, target: Target) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", kernel.asm["amdgcn"])
        assert found, f"the assembly of {kernel.name} has no {name}"
        return int(found[1])

    return number("vgpr_count"), number("vgpr_spill_count")


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run([str(BIN / program), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
