"""What the tests of kernels rest on: that the interpreter computes as a GPU does."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from slipstream.kernels.triton import launch, probe  # noqa: E402


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_is_the_one_of_the_numbers(dtype: torch.dtype) -> None:
    device = torch.device("cpu" if launch.is_interpreted() else "cuda")
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out = torch.empty_like(a)
    product[(1,)](a, b, out, 16)
    wide = a.double() @ b.double()
    assert torch.allclose(out.double(), wide, atol=1e-4, rtol=0 if dtype is torch.float32 else 2.0**-8)


@pytest.mark.skipif(not launch.is_interpreted(), reason="a GPU needs no mending")
def test_bfloat16_is_rounded_to_the_nearest_even_number() -> None:
    import bf16_interpreter

    values = torch.cat((torch.randn(5000), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, torch.inf, -torch.inf])))
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (bf16_interpreter.rounded(values.numpy()) == expected).all()
    assert bf16_interpreter.rounded(np.array([np.nan], np.float32)) == 0x7FC0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU of compute capability 9.0, of which nothing is kept."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch.capability.cache_clear()
    launch.why_not.cache_clear()
    yield monkeypatch
    launch.capability.cache_clear()
    launch.why_not.cache_clear()


def starts(patch: pytest.MonkeyPatch, fails_with: Exception | None = None) -> None:
    """Kernels start on the GPU, or do not."""

    def start() -> None:
        if fails_with is not None:
            raise fails_with

    patch.setattr(probe, "start", start)


@pytest.mark.parametrize(("capability", "why"), [((7, 5), "7.5, and 8.0 is needed"), ((8, 0), ""), ((12, 0), "")])
def test_gpus_that_triton_does_not_compile_for_get_other_kernels(
    capability: tuple[int, int], why: str, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    starts(gpu)
    assert launch.runs_on("cuda") is not bool(why) and launch.why_not("cuda").endswith(why)
    assert not launch.runs_on("cpu")


NO_HEADERS = subprocess.CalledProcessError(1, ["gcc", "main.c", "-O3", "-shared"])


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("Triton Error: out of memory"), "RuntimeError: Triton Error: out of memory"),
        (NO_HEADERS, "gcc does not compile what it needs for that .*python3-dev"),
        (ImportError("/tmp/cuda_utils.so: failed to map segment from shared object"), "ImportError: .*map segment"),
        (AssertionError(), "AssertionError: without a message"),
    ],
)
def test_where_no_kernel_starts_other_kernels_run_and_the_reason_is_told(
    error: Exception, why: str, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setenv("CC", "gcc")
    starts(gpu, error)
    assert not launch.runs_on("cuda") and re.search(why, launch.why_not("cuda"))


def test_a_missing_compiler_is_told(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in images of PyTorch that are made for running alone."""
    gpu.delenv("CC", raising=False)
    gpu.setenv("PATH", str(tmp_path))
    starts(gpu, RuntimeError("Failed to find C compiler."))
    assert launch.why_not("cuda").endswith("there is none: install gcc, or name one in the variable CC")


def test_kernels_are_kept_elsewhere_where_the_home_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new"))
    launch.keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "new") and not list((tmp_path / "new").iterdir())
    monkeypatch.delenv("TRITON_CACHE_DIR")
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    try:
        launch.keep_kernels()
        kept = Path(os.environ["TRITON_CACHE_DIR"])
        assert kept.parent == tmp_path and kept.is_dir() and f"kept in {kept}" in caplog.text
        launch.keep_kernels()
        assert os.environ["TRITON_CACHE_DIR"] == str(kept)
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
