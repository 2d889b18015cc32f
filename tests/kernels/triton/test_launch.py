"""What the tests of kernels rest on: that the interpreter computes as a GPU does."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from slipstream.kernels.triton import launch  # noqa: E402


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


@pytest.mark.parametrize(("capability", "why"), [((7, 5), "7.5, and 8.0 is needed"), ((8, 0), ""), ((12, 0), "")])
def test_gpus_that_triton_does_not_compile_for_get_other_kernels(
    capability: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch.capability.cache_clear()
    try:
        assert launch.runs_on.__wrapped__("cuda") is not bool(why) and launch.too_old().endswith(why)
    finally:
        launch.capability.cache_clear()
