"""RMSNorm: the reference's numbers, for rows of any width that lie anywhere, alone or among others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton import launch, norm

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""One unit in the last place: the mean is summed in another order, which may tip the rounding."""


def some(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 40), (2, 1500), (1, norm.WIDEST)])
def test_it_is_the_references_norm(dtype: torch.dtype, weight_dtype: torch.dtype, rows: int, width: int) -> None:
    x, weight = some(rows, width, dtype=dtype) * 3, some(width, dtype=weight_dtype, seed=1)
    found, expected = norm.rms_norm(x, weight, EPS), ReferenceOps().rms_norm(x, weight, EPS)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype] + ROUNDING[expected.dtype], atol=1e-6)
    assert dtype is torch.float32 or (found == expected).float().mean() > 0.98, "it rounds elsewhere"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_what_it_becomes_as_the_reference_rounds_it(dtype: torch.dtype) -> None:
    x, residual, weight = some(5, 72, dtype=dtype), some(5, 72, dtype=dtype, seed=1), some(72, dtype=dtype, seed=2)
    total = residual + x
    found = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(found, norm.rms_norm(total, weight, EPS))
    x2, residual = x.clone(), total - x
    total = residual + x2
    assert torch.equal(norm.add_rms_norm(x2, residual, weight, EPS, out=x2), norm.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemmas_norm_adds_one_and_rounds_at_the_end(dtype: torch.dtype) -> None:
    x, weight = some(4, 48, dtype=dtype), some(48, dtype=dtype, seed=1)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1 + weight.double())
    found = norm.rms_norm(x, weight, EPS, plus_one=True)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * ROUNDING[dtype] + 1e-6, atol=1e-6)
    residual = x - x
    assert torch.equal(norm.add_rms_norm(x, residual, weight, EPS, plus_one=True), found)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 4),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_rows_have_the_same_bits_wherever_they_lie(
    tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    fused = some(tokens, (heads + 2) * width, dtype=dtype, seed=seed)
    weight = some(width, dtype=dtype, seed=seed + 1)
    x = fused[:, width:-width].unflatten(1, (heads, width))  # as query heads lie in what one matrix makes
    alone = norm.rms_norm(x[-1, -1], weight, EPS)
    together = norm.rms_norm(x, weight, EPS)
    assert torch.equal(together[-1, -1], alone)
    assert torch.equal(norm.rms_norm(x.contiguous().flatten(0, 1), weight, EPS).view_as(together), together)
    before = fused.clone()
    norm.rms_norm(x, weight, EPS, out=x)
    assert torch.equal(x, together)
    assert torch.equal(fused[:, :width], before[:, :width]) and torch.equal(fused[:, -width:], before[:, -width:])


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="16385"):
        norm.rms_norm(torch.ones(1, 16385, device=DEVICE), torch.ones(16385, device=DEVICE), EPS)
    with pytest.raises(ValueError, match="last stride is 3"):
        norm.rms_norm(torch.ones(4, 3, device=DEVICE).t(), torch.ones(4, device=DEVICE), EPS)
    with pytest.raises(ValueError, match="two levels"):
        x = torch.ones(3, 5, 7, 4, device=DEVICE)[:, :4, :6]
        norm.rms_norm(x, torch.ones(4, device=DEVICE), EPS)
    assert norm.rms_norm(torch.ones(0, 4, device=DEVICE), torch.ones(4, device=DEVICE), EPS).shape == (0, 4)
