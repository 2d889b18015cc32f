"""The matrix product of a single row."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.single import ROWS, WIDTH, SingleWeight, single

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@settings(max_examples=8)
@given(
    n=st.integers(1, 3 * ROWS),
    k=st.integers(1, 130) | st.sampled_from([WIDTH, WIDTH + 1, 5 * WIDTH]),
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
@example(n=ROWS + 1, k=6 * WIDTH - 3, dtype=torch.bfloat16, biased=True, seed=0)
def test_it_is_the_exact_product_rounded_once(n: int, k: int, dtype: torch.dtype, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((1, k), (n, k + 3), (n,))
    )
    weight = weight[:, :k]
    found = single(x, weight, bias if biased else None)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    assert found.dtype is dtype and found.shape == (1, n)
    lost = float((x.double().abs() @ weight.double().abs().T).amax()) * 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=lost + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gives_the_same_for_a_row_as_for_rows_but_for_rounding(dtype: torch.dtype) -> None:
    weight = SingleWeight(40, 70, dtype, DEVICE, bias=True)
    generator = torch.Generator().manual_seed(0)
    weight.fill(torch.randn(40, 70, generator=generator))
    weight.fill_bias(torch.randn(40, generator=generator))
    x = torch.randn(3, 70, generator=generator).to(DEVICE)
    rows, row = weight(x), weight(x[1:2])
    assert row.dtype is rows.dtype is dtype
    torch.testing.assert_close(row, rows[1:2], rtol=2.0**-7 if dtype is torch.bfloat16 else 1e-5, atol=2e-2)


def test_other_products_are_refused() -> None:
    x, weight = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device=DEVICE)[:, 0], torch.zeros(4, 8, device=DEVICE)
    for rows, matrix in ((x, weight.bfloat16()), (x[:1], weight), (x[:1, :4], weight.bfloat16())):
        with pytest.raises(ValueError, match="the product of"):
            single(rows, matrix)
