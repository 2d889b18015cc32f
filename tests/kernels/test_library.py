"""Which variant of the compiled kernels is used."""

import os
import subprocess
import sys

import pytest

from slipstream.kernels.native import library

CODE = "from slipstream.kernels.native import library; print(library.isa())"
pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")


def isa(wanted: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {library.ISA_VARIABLE: wanted}
    return subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, text=True, env=environment)


def test_the_environment_chooses_the_variant() -> None:
    """avx2 runs wherever any of them does."""
    assert isa("avx2").stdout == "avx2\n"
    done = isa("avx3")
    assert done.returncode and "SLIPSTREAM_ISA=avx3: there are no such kernels" in done.stderr
