"""Picking rows: embeddings, and hidden states to sample from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.rows import Rows, take_rows

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=10)
@given(
    count=st.integers(1, 9),
    width=st.integers(1, 70) | st.just(2500),
    taken=st.lists(st.integers(-1, 8), max_size=6),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_rows_are_those_of_the_index_and_zeros_elsewhere(
    count: int, width: int, taken: list[int], dtype: torch.dtype, index: torch.dtype
) -> None:
    source = torch.randn(count, width + 3, device=DEVICE).to(dtype)[:, 1 : width + 1]
    expected = torch.zeros(len(taken), width, dtype=dtype, device=DEVICE)
    for place, row in enumerate(taken):
        if 0 <= row < count:
            expected[place] = source[row]
    at = torch.tensor(taken, dtype=index, device=DEVICE)
    assert torch.equal(take_rows(source, at), expected)
    wide = torch.full((len(taken), width + 1), 7.0, device=DEVICE)
    take_rows(source, at, out=wide[:, :width])
    assert torch.equal(wide[:, :width], expected.float()) and (wide[:, width] == 7).all()


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), max_size=4),
    cuts=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    width=st.integers(1, 3),
)
def test_rows_are_addressed_as_torch_addresses_them(sizes: list[int], cuts: list[int], width: int) -> None:
    whole = torch.arange(1000.0)[
        : int(torch.tensor([*(s + c for s, c in zip(sizes, cuts, strict=False)), width]).prod())
    ]
    x = whole.view(*(s + c for s, c in zip(sizes, cuts, strict=False)), width)
    x = x[tuple(slice(0, s) for s in sizes)]
    try:
        rows = Rows.of(x)
    except ValueError:
        assert sum(c > 0 for c in cuts[1 : len(sizes)]) > 1, "one gap between rows is nothing special"
        return
    starts = [row // rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride for row in range(rows.count)]
    assert starts == x[..., 0].flatten().int().tolist()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="matrix with contiguous rows"):
        take_rows(torch.ones(3, 4, device=DEVICE).t(), torch.zeros(1, dtype=torch.int32, device=DEVICE))
