"""Products with matrices of few bits: exactly those of the numbers that are stored."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.linear import Split
from slipstream.kernels.triton.quantized import (
    QuantizedMatrix,
    pack_fp8,
    pack_int4,
    pack_int8,
    quantized_linear,
    unpack,
)

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PACKINGS = {
    "int8": pack_int8,
    "fp8": pack_fp8,
    "fp8 with one scale": lambda weight: pack_fp8(weight, per_tensor=True),
    "int4 by 32": lambda weight: pack_int4(weight, 32),
    "int4 by 64": lambda weight: pack_int4(weight, 64),
    "int4 by 128": lambda weight: pack_int4(weight),
}


def some(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weight(n: int, k: int, seed: int) -> Tensor:
    """Rows of very different sizes, one of them all zeros, and one on one side of zero."""
    numbers = some(n, k, dtype=torch.float32, seed=seed) * torch.logspace(-2, 1, n, device=DEVICE)[:, None]
    numbers[n // 2] = 0
    numbers[n // 3] = numbers[n // 3].abs() + 1
    return numbers


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=3)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 300) | st.just(1601),
    dtype=st.sampled_from(list(ROUNDING)),
    biased=st.booleans(),
    tile_rows=st.sampled_from([0, 16, 64]),
    seed=st.integers(0, 99),
)
@example(m=17, n=65, k=1601, dtype=torch.bfloat16, biased=True, tile_rows=0, seed=0)
def test_it_is_the_exact_product_rounded_and_rows_have_the_same_bits_alone(
    packing: str, m: int, n: int, k: int, dtype: torch.dtype, biased: bool, tile_rows: int, seed: int
) -> None:
    matrix = PACKINGS[packing](weight(n, k, seed))
    x = some(m, k + 2, dtype=dtype, seed=seed + 1)[:, 1 : k + 1]
    bias = some(n, dtype=dtype, seed=seed + 2) if biased else None
    found = quantized_linear(x, matrix, bias, tile_rows=tile_rows)
    exact = x.double() @ unpack(matrix).double().T + (0 if bias is None else bias.double())
    assert found.dtype is dtype
    lost = (x.double().abs() @ unpack(matrix).double().abs().T).amax() * 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=float(lost) + 1e-6)
    alone = quantized_linear(x[-1:], matrix, bias, tile_rows=tile_rows or (16 if m <= 16 else 64))
    assert torch.equal(alone[0], found[-1])


@pytest.mark.parametrize("packing", PACKINGS)
def test_bits_are_the_same_whether_parts_are_computed_together_or_apart(
    monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    matrix = PACKINGS[packing](weight(40, 1600, 0))
    x, bias = some(20, 1600, dtype=torch.bfloat16, seed=1), some(40, dtype=torch.bfloat16, seed=2)
    apart = quantized_linear(x, matrix, bias)
    monkeypatch.setattr(Split, "apart", lambda *sizes: False)
    assert torch.equal(quantized_linear(x, matrix, bias), apart)


@settings(max_examples=20)
@given(packing=st.sampled_from(list(PACKINGS)), n=st.integers(1, 9), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_packed_matrix_is_close_to_what_it_was(packing: str, n: int, k: int, seed: int) -> None:
    numbers = weight(n, k, seed)
    matrix = PACKINGS[packing](numbers)
    assert matrix.n == n and matrix.k == k and unpack(matrix).shape == (n, k)
    error = (unpack(matrix) - numbers).abs()
    for row in range(n):
        largest = numbers.abs().amax() if "one scale" in packing else numbers[row].abs().amax()
        if packing == "int8":
            bound = largest / 127 * 0.501
        elif "fp8" in packing:
            bound = largest / 448 * 16.01  # half of the distance between the largest numbers
        else:
            spread = numbers[row].clamp(min=0).amax() - numbers[row].clamp(max=0).amin()
            bound = spread / 15 * 1.1 + 1e-9
        assert error[row].amax() <= bound


def test_four_bits_take_four_bits() -> None:
    numbers = weight(64, 1024, 0)
    assert pack_int4(numbers).num_bytes == 64 * (512 + 8 * 3)
    assert pack_int8(numbers).num_bytes == pack_fp8(numbers).num_bytes == 64 * (1024 + 4)


def test_what_does_not_fit_is_said() -> None:
    matrix: QuantizedMatrix = pack_int8(torch.ones(3, 4, device=DEVICE))
    with pytest.raises(ValueError, match="the product of"):
        quantized_linear(torch.ones(3, 5, device=DEVICE), matrix)
    with pytest.raises(ValueError, match="groups of 16 numbers"):
        pack_int4(torch.ones(3, 4, device=DEVICE), 16)
    assert quantized_linear(torch.ones(0, 4, device=DEVICE), matrix).shape == (0, 3)
