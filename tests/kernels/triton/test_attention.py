"""Paged attention in Triton against the plain formula, and the equations that its bits keep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import DEVICE, cells_of, device_batch, scattered_tables
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.kv_cache import quantise
from slipstream.kernels.triton import attention as kernels
from slipstream.kernels.triton.attention import LONGEST_ROWS, Tiles, attention

SMALL = Tiles(rows=16, chunk=16, split=32, warps=4, stages=2)
"""Short sequences have several splits of several chunks."""
FP8, INT8 = torch.float8_e4m3fn, torch.int8
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """Sequences in a cache, with a query for every token."""

    def __init__(
        self,
        lengths: Sequence[int],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.lengths, self.block_size = lengths, block_size
        self.tables, num_blocks = scattered_tables(lengths, block_size, seed)
        self.q = [random(length, heads, head_dim).to(dtype) for length in lengths]
        self.sinks = random(heads)
        cells = num_blocks * block_size
        keys, values = (random(cells, kv_heads, head_dim) for _ in range(2))
        self.scales: tuple[Tensor, Tensor] | None = None
        if stored in (FP8, INT8):
            (self.keys, of_keys), (self.values, of_values) = (quantise(x, stored) for x in (keys, values))
            self.scales = of_keys.flatten(), of_values.flatten()
        else:
            self.keys, self.values = (x.to(stored or dtype) for x in (keys, values))

    def attend(
        self,
        counts: Sequence[int],
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        spare_tokens: int = 0,
        spare_segments: int = 0,
        max_context: int | None = None,
        tiles: Tiles | None = SMALL,
        **options: object,
    ) -> list[Tensor]:
        """The last ``counts`` tokens before these lengths of these sequences, all by default."""
        lengths, rows = lengths or self.lengths, range(len(self.lengths)) if rows is None else rows
        batch = device_batch(self.tables, self.block_size, counts, lengths, rows, (), spare_tokens, spare_segments)
        used = [self.q[row][end - count : end] for row, end, count in zip(rows, lengths, counts, strict=True)]
        q = torch.cat([*used, torch.full((spare_tokens, *self.q[0].shape[1:]), torch.nan).to(used[0])])
        # As a part of a wider tensor, as queries are.
        q = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)[:, : q.shape[1]]
        out = attention(
            *(q, self.keys, self.values, batch, 0.25),
            max_context=max_context or max(lengths),
            scales=self.scales,
            rows=tiles,
            **options,  # type: ignore[arg-type]
        )
        assert out.dtype is q.dtype and out.is_contiguous()
        return list(out[: sum(counts)].split(list(counts)))

    def expected(self, row: int, count: int, length: int | None = None, **options: object) -> Tensor:
        length = length or self.lengths[row]
        cells = cells_of(self.tables, self.block_size, row, length)
        k, v = self.keys[cells].float(), self.values[cells].float()
        if self.scales is not None:
            k, v = (x * scales.view(-1, x.shape[1], 1)[cells] for x, scales in zip((k, v), self.scales, strict=True))
        q = self.q[row][length - count : length].float()
        return reference.attention(q, k, v, 0.25, **options)  # type: ignore[arg-type]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).abs().max() <= CLOSE[a.dtype] * (1 + b.abs().max())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, FP8),
        (torch.float16, FP8),
        (torch.float32, INT8),
        (torch.bfloat16, INT8),
    ],
)
@pytest.mark.parametrize("option", ["plain", "window", "softcap", "sinks", "all"])
def test_it_is_the_formula(dtype: torch.dtype, stored: torch.dtype, option: str) -> None:
    counts = [1, 7, 3]
    case = Case([70, 21, 3], 6, 2, 32, dtype, stored)
    options: dict[str, object] = {"window": 13, "softcap": 2.0, "sinks": case.sinks}
    options = options if option == "all" else {name: options[name] for name in options if name == option}
    found = case.attend(counts, **options)
    assert_close(found, [case.expected(row, count, **options) for row, count in enumerate(counts)])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 64), (9, 3, 80), (10, 2, 96), (40, 1, 128), (2, 1, 192), (4, 2, 256), (3, 3, 36)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_heads_of_any_size_in_tiles_of_both_kinds(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    counts = [LONGEST_ROWS + 1, 2]
    case = Case([LONGEST_ROWS + 20, 19], heads, kv_heads, head_dim, dtype)
    expected = [case.expected(row, count) for row, count in enumerate(counts)]
    assert_close(case.attend(counts, tiles=None, prompt=True), expected)
    assert_close(case.attend([2], [19], [1], tiles=None, max_context=600), expected[1:])


shapes = st.sampled_from([(4, 2, 32), (3, 1, 32), (2, 2, 48)])
windows = st.sampled_from([0, 0, 5, 40])


@settings(max_examples=6)
@given(
    segments=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 90)), min_size=1, max_size=4),
    shape=shapes,
    window=windows,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block_size=st.sampled_from([16, 32]),
    spare=st.tuples(st.integers(0, 20), st.integers(0, 5)),
    further=st.integers(0, 100),
    has_sinks=st.booleans(),
)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_with_room_to_spare(
    segments: list[tuple[int, int]],
    shape: tuple[int, int, int],
    window: int,
    dtype: torch.dtype,
    block_size: int,
    spare: tuple[int, int],
    further: int,
    has_sinks: bool,
) -> None:
    counts, lengths = [count for count, _ in segments], [count + before for count, before in segments]
    case = Case(lengths, *shape, dtype, block_size=block_size, seed=len(segments))
    options: dict[str, object] = {"window": window, "sinks": case.sinks if has_sinks else None}
    together = case.attend(
        counts, spare_tokens=spare[0], spare_segments=spare[1], max_context=max(lengths) + further, **options
    )
    assert_close(together, [case.expected(row, count, **options) for row, count in enumerate(counts)])
    for row, count in enumerate(counts):
        (alone,) = case.attend([count], [lengths[row]], [row], **options)
        assert torch.equal(alone, together[row])


@settings(max_examples=4)
@given(cuts=st.lists(st.integers(1, 39), max_size=3, unique=True), shape=shapes, window=windows, softcap=st.booleans())
def test_cutting_a_sequence_into_steps_changes_no_bit(
    cuts: list[int], shape: tuple[int, int, int], window: int, softcap: bool
) -> None:
    case = Case([40], *shape, torch.bfloat16)
    options = {"window": window, "softcap": 3.0 * softcap}
    (whole,) = case.attend([40], **options)
    pieces = [case.attend([b - a], [b], **options)[0] for a, b in pairwise([0, *sorted(cuts), 40])]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("window", [0, 40])
def test_splits_beside_each_other_are_those_one_after_the_other(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    case = Case([100, 33, 20], 6, 2, 32, torch.bfloat16)
    options: dict[str, object] = {"window": window, "sinks": case.sinks}
    beside = case.attend([9, 2, 1], **options)
    monkeypatch.setattr(kernels, "PARTS_BYTES", 0)
    after = case.attend([9, 2, 1], **options)
    assert all(torch.equal(a, b) for a, b in zip(beside, after, strict=True))
    monkeypatch.undo()
    for programs in (1, 20):  # all splits by one program, and by two
        monkeypatch.setattr(kernels, "ENOUGH_PROGRAMS", programs)
        several = case.attend([9, 2, 1], **options, max_context=400)
        assert all(torch.equal(a, b) for a, b in zip(beside, several, strict=True))
    (short,) = case.attend([1], [20], [2], **options)  # one split
    assert torch.equal(short, after[2])


@pytest.mark.parametrize("window", [0, 40])
def test_prompts_leave_short_segments_the_bits_of_rows(window: int) -> None:
    counts, lengths = [3, LONGEST_ROWS + 9, LONGEST_ROWS], [70, 90, 50]
    case = Case(lengths, dtype=torch.bfloat16)
    rows = case.attend(counts, window=window)
    for row_tokens in (None, sum(counts)):
        mixed = case.attend(counts, window=window, prompt=True, row_tokens=row_tokens, spare_segments=2)
        assert torch.equal(mixed[0], rows[0]) and torch.equal(mixed[2], rows[2])
        assert_close(mixed[1:2], [case.expected(1, counts[1], window=window)])
    # What lies before the prompt is covered by fewer tokens.
    front = case.attend([3, LONGEST_ROWS, LONGEST_ROWS + 9], [70, 50, 90], [0, 2, 1], row_tokens=3 + LONGEST_ROWS,
                        window=window, prompt=True)  # fmt: skip
    assert all(torch.equal(front[place], mixed[row]) for place, row in enumerate((0, 2, 1)))
    (alone,) = case.attend(counts[1:2], [90], [1], window=window, prompt=True, row_tokens=0)
    assert torch.equal(alone, mixed[1])


def test_a_prompt_has_the_same_bits_in_chunks() -> None:
    case = Case([120], dtype=torch.bfloat16)
    (whole,) = case.attend([120], prompt=True)
    pieces = [case.attend([b - a], [b], prompt=True)[0] for a, b in pairwise([0, 40, 85, 120])]
    assert torch.equal(torch.cat(pieces), whole)


def test_branches_have_the_bits_of_their_paths() -> None:
    """Two continuations in segments of their own share the blocks before them."""
    case = Case([48, 48], dtype=torch.bfloat16)
    shared = cells_of(case.tables, 16, 0, 32), cells_of(case.tables, 16, 1, 32)
    for data in (case.keys, case.values):
        data[shared[1]] = data[shared[0]]
    apart = case.attend([5, 9], [40, 45])
    case.tables[1, :2] = case.tables[0, :2]
    together = case.attend([5, 9], [40, 45])
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize("prompt", [False, True])
def test_what_others_left_in_the_cache_does_not_matter(prompt: bool) -> None:
    counts = [LONGEST_ROWS + 1, 1]
    case = Case([45, 67], dtype=torch.bfloat16)
    clean = case.attend(counts, prompt=prompt)
    own = torch.cat([cells_of(case.tables, 16, row, length) for row, length in enumerate(case.lengths)])
    for data in (case.keys, case.values):
        kept = data[own]
        data.fill_(torch.nan)
        data[own] = kept
    used = case.attend(counts, prompt=prompt)
    assert all(torch.equal(a, b) for a, b in zip(used, clean, strict=True))


def test_queries_whose_heads_are_apart_are_refused() -> None:
    case = Case([20])
    batch = device_batch(case.tables, 16, [1], [20])
    q = torch.zeros(1, 32, 4, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match="beside each other"):
        attention(q, case.keys, case.values, batch, 0.25, max_context=20)


def test_tiles_cover_every_group() -> None:
    for group in (1, 3, 8, 40, 71):
        for make in (kernels.row_tiles, kernels.prompt_tiles):
            for operand in (torch.float32, torch.bfloat16):
                tiles = make(128, group, operand)
                assert tiles.rows >= max(16, group)
                assert tiles.split % tiles.chunk == 0
