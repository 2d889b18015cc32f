import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels.native import library
from slipstream.kernels.native.weight import PackedWeight

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native kernels on this machine")
DTYPES = [torch.float32, torch.bfloat16]


def linear(n: int, k: int, dtype: torch.dtype, bias: bool = True) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + k)
    weight = torch.randn(n, k, generator=generator).to(dtype).float()
    offset = torch.randn(n, generator=generator)
    packed = PackedWeight(n, k, dtype, bias=bias)
    packed.fill(weight)
    if bias:
        packed.fill_bias(offset)
    return packed, weight, offset


@given(n=st.integers(1, 200), k=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_rows_are_those_that_were_filled_in(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, 2 * k).to(dtype)
    packed = PackedWeight(n, 2 * k, dtype)
    packed.fill(weight)
    order = np.random.default_rng(0).permutation(n).astype(np.int32)
    assert torch.equal(packed.rows(torch.from_numpy(order)), weight.float()[torch.from_numpy(order).long()])


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(n=st.integers(1, 300), k=st.integers(1, 100), rows=st.integers(1, 40))
def test_linear_is_x_w_transposed_plus_bias(isa: str, dtype: torch.dtype, n: int, k: int, rows: int) -> None:
    packed, weight, offset = linear(n, 2 * k, dtype)
    x = torch.randn(rows, 2 * k)
    expected = x.to(dtype).double() @ weight.double().T + offset
    tolerance = 1e-5 * (2 * k) ** 0.5 * max(1.0, float(expected.abs().max()))
    assert (packed(x).double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 3, 5, 7, 8, 13, 33, 64])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa: str, dtype: torch.dtype, rows: int) -> None:
    packed, _, _ = linear(192, 576, dtype)
    x = torch.randn(rows, 576)
    together = packed(x)
    for row in range(rows):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])


def test_fill_overwrites_interleaved_panels_in_place(isa: str) -> None:
    packed = PackedWeight(64, 32, torch.float32)
    before = packed.panels.data_ptr()
    gate, up = torch.randn(32, 32), torch.randn(32, 32)
    packed.fill(gate, 0, 0, 2)
    packed.fill(up, 0, 1, 2)
    x = torch.randn(3, 32)
    out = packed(x).view(3, 4, 16)
    assert torch.allclose(out[:, 0::2].reshape(3, 32), x @ gate.T, atol=1e-4)
    assert torch.allclose(out[:, 1::2].reshape(3, 32), x @ up.T, atol=1e-4)
    assert packed.panels.data_ptr() == before


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, threads: int) -> None:
    native = library.load()
    assert native is not None
    packed, _, _ = linear(960, 576, torch.bfloat16)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 576)).astype(np.float32))
    native.slip_set_threads(1)
    alone = packed(x)
    native.slip_set_threads(threads)
    assert all(torch.equal(packed(x), alone) for _ in range(20))
