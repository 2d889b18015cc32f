from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.kernels.native import library
from slipstream.kernels.native.weight import PackedWeight
from slipstream.kernels.weight import DenseWeight, Weight

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native kernels on this machine")
CPU = torch.device("cpu")
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


@settings(max_examples=40)
@given(
    n=st.integers(1, 150),
    pairs=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    packed=st.booleans(),
    bias=st.booleans(),
    data=st.data(),
)
def test_a_matrix_comes_whole_or_in_parts_of_any_size_and_order(
    n: int, pairs: int, dtype: torch.dtype, packed: bool, bias: bool, data: st.DataObject
) -> None:
    k = 2 * pairs
    kinds = {
        True: lambda: PackedWeight(n, k, dtype, bias=bias),
        False: lambda: DenseWeight(n, k, dtype, CPU, bias=bias),
    }
    whole: Weight
    parts: Weight
    whole, parts = kinds[packed](), kinds[packed]()
    assert (parts.n, parts.k) == (n, k)
    assert parts.num_bytes >= n * k * dtype.itemsize and parts.num_bytes == whole.num_bytes
    matrix, offset = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    whole.fill(matrix)
    borders = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    for begin, end in data.draw(st.permutations(list(pairwise(borders)))):
        parts.fill(matrix[begin:end].double(), begin)
        if bias:
            parts.fill_bias(offset[begin:end], begin)
    if bias:
        whole.fill_bias(offset)
    order = torch.randperm(n)
    assert torch.equal(parts.rows(order).float(), matrix[order].float())
    x = torch.randn(3, k)
    assert torch.equal(parts(x), whole(x))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_matrices_whose_panels_take_turns_come_in_parts_too(dtype: torch.dtype, rows: list[int]) -> None:
    n, k = 96, 8
    packed, whole = PackedWeight(2 * n, k, dtype), PackedWeight(2 * n, k, dtype)
    gate, up = torch.randn(n, k), torch.randn(n, k)
    for first, matrix in enumerate((gate, up)):
        whole.fill(matrix, 0, first, 2)
        begin = 0
        for count in [*rows, n]:
            packed.fill(matrix[begin : begin + count], begin, first, 2)
            begin = min(begin + count, n)
    assert torch.equal(packed.panels, whole.panels)


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
