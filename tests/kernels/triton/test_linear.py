"""The matrix product whose rows do not depend on each other."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.linear import Split, linear

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def some(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@settings(max_examples=6)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 130) | st.sampled_from([1024, 1601]),
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
@example(m=65, n=65, k=1601, dtype=torch.bfloat16, biased=True, seed=0)
@example(m=3, n=8200, k=64, dtype=torch.float16, biased=False, seed=0)
def test_it_is_the_exact_product_rounded_and_rows_have_the_same_bits_alone(
    m: int, n: int, k: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    x = some(m, k + 2, dtype=dtype, seed=seed)[:, 1 : k + 1]
    weight = some(n, k + 3, dtype=dtype, seed=seed + 1)[:, :k]
    bias = some(n, dtype=dtype, seed=seed + 2) if biased else None
    found = linear(x, weight, bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype is dtype
    lost = float((x.double().abs() @ weight.double().abs().T).amax()) * 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=lost + 1e-6)
    assert torch.equal(linear(x[-1:], weight, bias)[0], found[-1])
    out = torch.full((m, n + 1), 7.0, dtype=dtype, device=DEVICE)
    linear(x, weight, bias, out=out[:, :n])
    assert torch.equal(out[:, :n], found) and (out[:, n] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_whether_parts_are_computed_together_or_apart(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, weight = some(20, 1600, dtype=dtype, seed=0), some(40, 1600, dtype=dtype, seed=1)
    bias = some(40, dtype=dtype, seed=2)
    split = Split.of(40, 1600, 64, 64)
    assert split.count == 3 and split.apart(20, 40, 64, 64)
    apart = linear(x, weight, bias)
    monkeypatch.setattr(Split, "apart", lambda *sizes: False)
    assert torch.equal(linear(x, weight, bias), apart)


@given(n=st.integers(1, 200_000), k=st.integers(1, 30_000))
def test_parts_cover_the_inner_dimension(n: int, k: int) -> None:
    split = Split.of(n, k, 64, 64)
    assert (split.count - 1) * split.size < k <= split.count * split.size and split.size % 64 == 0


def test_what_does_not_fit_is_said() -> None:
    x = torch.ones(3, 4, device=DEVICE)
    for other in (torch.ones(5, 3, device=DEVICE), torch.ones(4, 5, device=DEVICE).t(), x.half()):
        with pytest.raises(ValueError, match="the product of"):
            linear(x, other)
    assert linear(x[:0], x).shape == (0, 3)
