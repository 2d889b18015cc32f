"""The paged attention against the plain formula, and its independence of how a sequence is cut into steps."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cached import BF16, F32, FP8, INT8, KEPT, KINDS, Kept, Sequences, new_cache, shapes, with_variants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.kernels import reference
from slipstream.kernels.batch import make_batch
from slipstream.kernels.kv_cache import LARGEST, DenseKVCache, PagedKVCache, bits, quantise
from slipstream.kernels.native import library
from slipstream.kernels.native.kv_cache import NativeKVCache
from slipstream.kernels.triton import launch

INTERPRETED: list[Any] = []
"""Its kernels take seconds for what the others do in milliseconds, so it gets smaller examples, and fewer."""
if launch.runs_on("cpu"):
    from slipstream.kernels.triton.kv_cache import TritonKVCache

    INTERPRETED.append(TritonKVCache)
ERRORS = {F32: 2e-5, BF16: 0.06}
"""Largest difference from the formula over what is kept, by the format that is computed with."""
few = settings(max_examples=2)
small_shapes = st.sampled_from([(4, 1, 16), (3, 1, 24)])


@with_variants(KINDS)
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    shape=shapes,
    block_size=st.sampled_from([16, 32]),
    window=st.sampled_from([0, 0, 5, 130]),
    kept=st.sampled_from(KEPT),
    seed=st.integers(0, 99),
)
# Numbers that 8 bits make something else of: the formula over what was not rounded differs by 0.36.
@example(lengths=[1, 124, 195, 300], shape=(2, 1, 256), block_size=16, window=0, kept=(FP8, F32), seed=0)
def test_prefill_equals_the_formula(
    isa: str,
    kind: type[DenseKVCache],
    lengths: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    window: int,
    kept: Kept,
    seed: int,
) -> None:
    prefill(kind, lengths, shape, block_size, window, kept, seed)


@pytest.mark.parametrize("kind", INTERPRETED)
@few
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    shape=small_shapes,
    window=st.sampled_from([0, 5]),
    kept=st.sampled_from(KEPT),
)
def test_prefill_on_a_gpu_equals_the_formula(
    kind: type[DenseKVCache], lengths: list[int], shape: tuple[int, int, int], window: int, kept: Kept
) -> None:
    prefill(kind, lengths, shape, 16, window, kept, 1)


def prefill(
    kind: type[DenseKVCache],
    lengths: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    window: int,
    kept: Kept,
    seed: int,
) -> None:
    s = Sequences(lengths, *shape, block_size, seed)
    out = s.run(new_cache(kind, s, kept), list(range(len(lengths))), [0] * len(lengths), lengths, window)
    k, v = ([as_kept(each, kept[0]) for each in of_all] for of_all in (s.k, s.v))
    expected = torch.cat([reference.attention(*each, 0.125, window) for each in zip(s.q, k, v, strict=True)])
    assert (out - expected).abs().max() < ERRORS[kept[1]]


def as_kept(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a cache keeps of keys or values, in float32. What is lost in 8 bits is the subject of test_eight_bits.py."""
    if dtype not in LARGEST:
        return x.to(dtype).float()
    numbers, scales = quantise(x, dtype)
    return numbers.float() * scales.float()


@pytest.mark.skipif(NativeKVCache not in KINDS, reason="no native kernels on this machine")
@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(1, 399), max_size=6, unique=True),
    shape=shapes,
    window=st.sampled_from([0, 0, 5, 130]),
    kept=st.sampled_from(KEPT),
)
def test_cutting_a_sequence_into_steps_changes_no_bit(
    isa: str, cuts: list[int], shape: tuple[int, int, int], window: int, kept: Kept
) -> None:
    s = Sequences([400, 77], *shape, 16, seed=1)
    whole = s.run(new_cache(NativeKVCache, s, kept), [0, 1], [0, 0], [400, 77], window)[:400]
    cache = new_cache(NativeKVCache, s, kept)
    borders = [0, *sorted(cuts), 400]
    pieces = [s.run(cache, [0], [a], [b], window) for a, b in pairwise(borders)]
    assert torch.equal(torch.cat(pieces), whole)


@with_variants(KINDS)
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(120, 140), min_size=1, max_size=3),
    shape=shapes,
    kept=st.sampled_from(KEPT),
    steps=st.booleans(),
)
def test_what_others_left_in_the_cache_does_not_matter(
    isa: str,
    kind: type[DenseKVCache],
    lengths: list[int],
    shape: tuple[int, int, int],
    kept: Kept,
    steps: bool,
) -> None:
    left_behind(kind, lengths, shape, kept, steps)


@pytest.mark.parametrize("kind", INTERPRETED)
@few
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2), shape=small_shapes, steps=st.booleans())
def test_what_others_left_in_the_cache_of_a_gpu_does_not_matter(
    kind: type[DenseKVCache], lengths: list[int], shape: tuple[int, int, int], steps: bool
) -> None:
    left_behind(kind, lengths, shape, (F32, F32), steps)


def left_behind(
    kind: type[DenseKVCache], lengths: list[int], shape: tuple[int, int, int], kept: Kept, steps: bool
) -> None:
    """Not even numbers that are none: blocks are handed on as they are."""
    s = Sequences(lengths, *shape, 16, seed=5)
    rows = list(range(len(lengths)))

    def run(cache: PagedKVCache) -> torch.Tensor:
        if not steps:
            return s.run(cache, rows, [0] * len(rows), lengths, 0)
        s.run(cache, rows, [0] * len(rows), [max(length - 1, 1) for length in lengths], 0)
        return s.run(cache, rows, [length - 1 for length in lengths], lengths, 0)

    clean, used = new_cache(kind, s, kept), new_cache(kind, s, kept)
    bits(clean._data).zero_()
    used._data.view(torch.uint8).fill_(0x7F) if clean.shape.has_scales else used._data.fill_(float("nan"))
    used._scales.fill_(float("nan"))
    assert torch.equal(run(used), run(clean))


@with_variants(KINDS + INTERPRETED)
@pytest.mark.parametrize("kept", [(BF16, BF16), (INT8, BF16), (FP8, F32)])
def test_copied_blocks_hold_the_same_tokens(isa: str, kind: type[DenseKVCache], kept: Kept) -> None:
    s = Sequences([40], 4, 2, 64, 16, seed=3)
    cache = new_cache(kind, s, kept)
    first = s.run(cache, [0], [0], [40], 0)
    spare = next(block for block in range(s.num_blocks) if block not in s.tables)
    cache.copy_blocks([(int(s.tables[0, 2]), spare)])
    s.tables[0, 2] = spare
    again = cache.plan(s.batch([0], [0], [40])).attend(0, s.q[0], 0.125)
    assert torch.equal(first, again)


@with_variants(KINDS)
@settings(max_examples=20)
@given(
    cut=st.integers(1, 47),
    shape=shapes,
    block_size=st.sampled_from([16, 32]),
    kept=st.sampled_from(KEPT),
    mirrored=st.booleans(),
)
def test_mirrored_and_copied_tokens_are_those_stored_in_place(
    isa: str,
    kind: type[DenseKVCache],
    cut: int,
    shape: tuple[int, int, int],
    block_size: int,
    kept: Kept,
    mirrored: bool,
) -> None:
    mirror(kind, cut, shape, block_size, kept, mirrored)


@pytest.mark.parametrize("kind", INTERPRETED)
@few
@given(cut=st.integers(1, 47), shape=small_shapes, mirrored=st.booleans())
def test_mirrored_and_copied_tokens_on_a_gpu_are_those_stored_in_place(
    kind: type[DenseKVCache], cut: int, shape: tuple[int, int, int], mirrored: bool
) -> None:
    mirror(kind, cut, shape, 16, (BF16, BF16), mirrored)


def mirror(
    kind: type[DenseKVCache],
    cut: int,
    shape: tuple[int, int, int],
    block_size: int,
    kept: Kept,
    mirrored: bool,
) -> None:
    """A second sequence gets tokens cut … 47 of the first; what is before them it computes itself."""
    s = Sequences([48, 48], *shape, block_size, seed=5)
    s.q[1], s.k[1], s.v[1] = s.q[0], s.k[0], s.v[0]
    cache = new_cache(kind, s, kept)
    positions = np.arange(cut, 48)
    cells = s.tables[:, positions // block_size] * block_size + positions % block_size
    ids = np.zeros(48 + cut, np.int32)
    ends = np.array([48, cut], np.int32)
    mirrors = np.stack([positions, cells[1] // block_size, cells[1] % block_size], 1).astype(np.int32)
    batch = make_batch(ids, ends, ends, s.tables, np.arange(2, dtype=np.int32), block_size, mirrors[: 99 * mirrored])
    cache.plan(batch).store(0, torch.cat((s.k[0], s.k[1][:cut])), torch.cat((s.v[0], s.v[1][:cut])))
    if not mirrored:
        cache.copy_cells(list(zip(cells[0].tolist(), cells[1].tolist(), strict=True)))
    first, second = (cache.plan(s.batch([row], [0], [48])).attend(0, s.q[0], 0.125) for row in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS + INTERPRETED)
@pytest.mark.parametrize("kept", [(F32, F32), (INT8, F32)])
def test_a_cache_that_gave_its_memory_back_takes_it_again_with_nothing_in_it(
    kind: type[DenseKVCache], kept: Kept
) -> None:
    s = Sequences([40, 9], 4, 2, 64, 16, seed=3)
    cache = new_cache(kind, s, kept)
    whole = cache.num_bytes
    assert whole == s.num_blocks * kind.block_bytes(cache.shape)
    before = s.run(cache, [0, 1], [0, 0], [40, 9], 0)
    cache.release()
    assert cache.num_bytes == 0
    cache.restore()
    assert cache.num_bytes == whole
    unwritten = cache.plan(s.batch([0], [39], [40])).attend(0, s.q[0][39:], 0.125)
    assert not unwritten.any(), "values of the time before"
    assert torch.equal(s.run(cache, [0, 1], [0, 0], [40, 9], 0), before)


def test_softcap_bounds_the_scores() -> None:
    q, k, v = torch.randn(5, 4, 32) * 9, torch.randn(5, 2, 32) * 9, torch.randn(5, 2, 32)
    scores = torch.einsum("qhd,khd->hqk", q * 0.2, k.repeat_interleave(2, 1))
    scores = 30 * torch.tanh(scores / 30)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1))
    assert torch.allclose(reference.attention(q, k, v, 0.2, softcap=30.0), expected, atol=1e-5)


@pytest.mark.skipif(NativeKVCache not in KINDS, reason="no native kernels on this machine")
@settings(max_examples=20)
@given(
    length=st.integers(1, 1200),
    last=st.integers(1, 5),
    shape=shapes,
    window=st.sampled_from([0, 0, 5, 300]),
    kept=st.sampled_from(KEPT),
    threads=st.sampled_from([1, 2, 3, 8]),
)
def test_what_few_queries_see_is_shared_among_threads_and_changes_no_bit(
    isa: str, length: int, last: int, shape: tuple[int, int, int], window: int, kept: Kept, threads: int
) -> None:
    native = library.load()
    assert native is not None
    s = Sequences([length, 40, 40, 40, 40, 40], *shape, 16, seed=1)
    cache = new_cache(NativeKVCache, s, kept)
    first = max(length - last, 0)
    native.slip_set_threads(1)
    whole = s.run(cache, [0], [0], [length], window)[first:]
    native.slip_set_threads(threads)
    assert all(torch.equal(s.run(cache, [0], [first], [length], window), whole) for _ in range(3))
    in_company = s.run(cache, [1, 0, 2, 3, 4, 5], [39, first, 0, 39, 39, 0], [40, length, 40, 40, 40, 40], window)
    assert torch.equal(in_company[1 : 1 + length - first], whole)
