"""Kernels in Triton's interpreter: with bfloat16 as the hardware computes it, and on the CPU."""

from __future__ import annotations

import pytest
import torch

from slipstream.kernels.triton import launch

if not torch.cuda.is_available():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    assert launch.is_interpreted(), "tests/conftest.py sets TRITON_INTERPRET before anything imports Triton"
    import bf16_interpreter  # noqa: F401  (mends the interpreter)
