"""Low-rank products for rows that have an adapter each, or none."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.compute import LayerShape
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.adapter import (
    DOWN,
    GATE_UP,
    LEAST_ADAPTERS,
    MATRICES,
    OUT,
    QKV,
    AdapterTable,
    TritonAdapter,
    widths_of,
)

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
LAYERS = 2


def shape_of(hidden: int, inner: int) -> LayerShape:
    return LayerShape(hidden=hidden, intermediate=inner, heads=3, kv_heads=1, head_dim=16, norm_eps=1e-5)


Matrices = list[dict[str, tuple[Tensor, Tensor]]]


def matrices(shape: LayerShape, rank: int, seed: int, left_out: tuple[str, ...] = ()) -> Matrices:
    random = torch.Generator().manual_seed(seed)
    inputs = (shape.hidden, shape.heads * shape.head_dim, shape.hidden, shape.intermediate)
    layers: Matrices = [{} for _ in range(LAYERS)]
    for layer in layers:
        for names, widths, k in zip(MATRICES, widths_of(shape), inputs, strict=True):
            for name, n in zip(names, widths, strict=True):
                a = torch.randn(rank, k, generator=random) / k**0.5
                b = torch.randn(n, rank, generator=random)
                if name not in left_out:
                    layer[name] = a, b
    return layers


def expected(
    x: Tensor, numbers: list[int], adapters: list[Matrices], layer: int, matrix: int, shape: LayerShape, out: Tensor
) -> Tensor:
    """In double; A and B as numbers of the format of x."""
    found = out.double()
    for row, number in enumerate(numbers):
        if number:
            given = adapters[number - 1][layer]
            parts = zip(MATRICES[matrix], found[row].split(list(widths_of(shape)[matrix])), strict=True)
            for name, part in parts:
                if name in given:
                    a, b = (each.to(DEVICE, x.dtype).double() for each in given[name])
                    part += x[row].double() @ a.T @ b.T
    return found


def table_of(shape: LayerShape, adapters: list[Matrices], dtype: torch.dtype) -> AdapterTable:
    table = AdapterTable(shape, LAYERS, dtype, DEVICE)
    assert table.use([TritonAdapter(shape, each, dtype, DEVICE) for each in adapters])
    return table


def added(table: AdapterTable, numbers: list[int], matrix: int, x: Tensor, out: Tensor, layer: int = 1) -> Tensor:
    found = out.clone()
    table.add(torch.tensor(numbers, dtype=torch.int32, device=DEVICE), layer, matrix, x, found)
    return found


def some(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@settings(max_examples=5)
@given(
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    ranks=st.tuples(*[st.integers(1, 34)] * 3),
    matrix=st.sampled_from([QKV, OUT, GATE_UP, DOWN]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
@example(numbers=[3, 0, 1, 1, 2, 2, 2] * 3, ranks=(64, 5, 17), matrix=QKV, dtype=torch.bfloat16, seed=0)
@example(numbers=[0, 2], ranks=(1, 64, 3), matrix=GATE_UP, dtype=torch.float16, seed=0)
@example(numbers=[0, 0, 0], ranks=(1, 2, 3), matrix=DOWN, dtype=torch.float32, seed=0)
def test_each_row_gets_what_its_adapter_adds_with_the_same_bits_alone(
    numbers: list[int], ranks: tuple[int, ...], matrix: int, dtype: torch.dtype, seed: int
) -> None:
    shape = shape_of(80, 150)
    adapters = [matrices(shape, rank, seed + rank) for rank in ranks]
    table = table_of(shape, adapters, dtype)
    k = {QKV: shape.hidden, OUT: 48, GATE_UP: shape.hidden, DOWN: shape.intermediate}[matrix]
    x = some(len(numbers), k + 3, dtype=dtype, seed=seed)[:, :k]
    out = some(len(numbers), sum(widths_of(shape)[matrix]), dtype=dtype, seed=seed + 1)
    found = added(table, numbers, matrix, x, out)
    exact = expected(x, numbers, adapters, 1, matrix, shape, out)
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=ROUNDING[dtype] * scale)
    for row, number in enumerate(numbers[:2]):
        alone = added(table, [number], matrix, x[row : row + 1], out[row : row + 1])
        assert torch.equal(alone[0], found[row])
        if not number:
            assert torch.equal(found[row], out[row])
    # In other company, with only its own adapter beside it.
    if numbers[-1]:
        own = table_of(shape, [adapters[numbers[-1] - 1]], dtype)
        assert torch.equal(added(own, [1], matrix, x[-1:], out[-1:])[0], found[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_are_cut_into_parts_that_are_added_in_order(dtype: torch.dtype) -> None:
    shape = shape_of(16, 2100)
    adapters = [matrices(shape, 20, 1), matrices(shape, 3, 2)]
    table = table_of(shape, adapters, dtype)
    numbers = [1, 2, 0, 1] * 20  # more than have a program for each adapter of a tile
    x, out = some(80, 2100, dtype=dtype, seed=1), some(80, 16, dtype=dtype, seed=2)
    found = added(table, numbers, DOWN, x, out)
    exact = expected(x, numbers, adapters, 1, DOWN, shape, out)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=ROUNDING[dtype] * float(exact.abs().max()))
    assert torch.equal(added(table, numbers[-9:], DOWN, x[-9:], out[-9:]), found[-9:])


def test_matrices_that_an_adapter_does_not_change_stay() -> None:
    shape = shape_of(32, 48)
    left_out = ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    adapters = [matrices(shape, 4, 1, left_out), matrices(shape, 9, 2)]
    table = table_of(shape, adapters, torch.float32)
    numbers = [1, 2, 1]
    for matrix, k in ((QKV, 32), (OUT, 48), (GATE_UP, 32), (DOWN, 48)):
        x, out = (
            some(3, k, dtype=torch.float32, seed=3),
            some(3, sum(widths_of(shape)[matrix]), dtype=torch.float32, seed=4),
        )
        exact = expected(x, numbers, adapters, 1, matrix, shape, out)
        torch.testing.assert_close(added(table, numbers, matrix, x, out).double(), exact, rtol=1e-5, atol=1e-5)
    alone = table_of(shape, adapters[:1], torch.float32)
    assert [rank > 0 for rank in alone.ranks] == [True, False, True, True]


def test_rows_of_another_format_are_taken_in_that_of_the_adapters() -> None:
    """Activations have the format of weights behind a product with them, which may be another."""
    shape = shape_of(16, 16)
    adapters = [matrices(shape, 3, 1)]
    table = table_of(shape, adapters, torch.float16)
    x, out = some(2, 16, dtype=torch.float32, seed=1), some(2, 16, dtype=torch.float32, seed=2)
    found = added(table, [1, 0], DOWN, x, out)
    exact = expected(x.half(), [1, 0], adapters, 1, DOWN, shape, out)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2.0**-9 * float(exact.abs().max()))


def test_the_table_stays_where_it_is_while_there_is_room() -> None:
    shape = shape_of(16, 16)
    one, other = (TritonAdapter(shape, matrices(shape, rank, rank), torch.float32, DEVICE) for rank in (5, 40))
    table = AdapterTable(shape, LAYERS, torch.float32, DEVICE)
    where = table.table.data_ptr()
    assert table.use([one]) and table.ranks == (16,) * 4
    assert table.use([None, other]) and table.ranks == (64,) * 4
    assert np.array_equal(table.table[1].cpu().numpy(), other.entries) and not table.table[0].any()
    assert table.table.data_ptr() == where
    assert not table.use([one] * (LEAST_ADAPTERS + 1))
    assert table.use([]) and table.ranks == (0,) * 4
