"""Which variant of the compiled kernels is used."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.kernels.native import library, limits

CODE = """
import os, sys
import torch  # takes a second; what is forked from here has it
for name in sys.argv[2:]:
    child = os.fork()
    if not child:
        os.environ[sys.argv[1]] = name
        from slipstream.kernels.native import library
        sys.exit(library.isa() != name)
    print(name, os.waitpid(child, 0)[1], flush=True)
"""
pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")


def test_the_environment_chooses_the_variant() -> None:
    there = library.variants()
    command = [sys.executable, "-P", "-c", CODE, library.ISA_VARIABLE, *there, "avx3"]
    done = subprocess.run(command, capture_output=True, text=True)
    ended = dict(line.split() for line in done.stdout.splitlines())
    assert {name: status == "0" for name, status in ended.items()} == there | {"avx3": False}, done.stderr
    for name in (name for name, runs in there.items() if not runs):
        assert f"SLIPSTREAM_ISA={name}: this processor does not run them" in done.stderr
    assert "SLIPSTREAM_ISA=avx3: there are no such kernels; here are " in done.stderr


def test_what_was_compiled_can_be_asked_for() -> None:
    """The option names the variants of all architectures."""
    names = get_args(get_type_hints(EngineConfig)["isa"])
    assert set(library.variants()) <= set(names)
    assert library.isa() in library.variants()
    with pytest.raises(library.IsaError, match="--isa avx3: there are no such kernels"):
        library.select("avx3")


def test_what_the_machine_can_do_is_measured() -> None:
    assert limits.read_bandwidth(rounds=1) > 1e6
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert limits.peak_flops(dtype, rounds=1) > 1e6


@pytest.mark.slow
def test_what_tests_have_the_kernels_do_is_done_again_without_python() -> None:
    """The program that replays it on other processors, on this one."""
    script = Path(__file__).parents[2] / "scripts" / "prove_kernels.py"
    done = subprocess.run([sys.executable, "-P", script, "--on", "native"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slip_forward" in done.stdout and " 0 failed" in done.stdout


def test_a_library_that_was_built_of_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structs may have other sizes, and calls would read beyond what they are given."""
    assert library.load.__wrapped__() is not None
    monkeypatch.setattr(library, "LAYOUT", library.LAYOUT + 8)
    assert library.load.__wrapped__() is None


def test_policies_of_bfloat16_have_the_same_functions() -> None:
    """Those of other processors are not compiled here; one that lacks something would be left out of the library."""

    def functions(file: str, name: str) -> set[str]:
        text = (Path(library.__file__).parents[1] / "csrc" / file).read_text()
        policy = text.split(f"struct {name} {{", 1)[1].split("\n private:", 1)[0].split("\n};", 1)[0]
        return set(re.findall(r"^  static [^(=]*?\b(\w+)\(", policy, re.MULTILINE))

    expected = functions("dense.h", "Bf16")
    assert {"dot", "store", "rounded"} <= expected
    assert functions("vec_avx512bf16.h", "VectorBf16") == functions("vec_neonbf16.h", "Bf16") == expected
