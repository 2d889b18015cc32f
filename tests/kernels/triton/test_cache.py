"""Places in the paged cache: found, filled, copied, and named in tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import DEVICE, cells_of, device_batch, on_device, scattered_tables
from torch import Tensor

from slipstream.kernels.kv_cache import CacheShape, TorchKVCache, quantise
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton.cache import Rotation, copy_rows, place, store, update_tables
from slipstream.kernels.triton.kv_cache import TritonKVCache

FP8, INT8 = torch.float8_e4m3fn, torch.int8
REFERENCE = ReferenceOps()
GENERATOR = torch.Generator().manual_seed(2)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE)


@settings(max_examples=12)
@given(
    segments=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 90)), min_size=1, max_size=9),
    spare=st.tuples(st.integers(0, 150), st.integers(0, 9)),
    block_size=st.sampled_from([1, 16, 32]),
)
def test_every_token_gets_its_place(segments: list[tuple[int, int]], spare: tuple[int, int], block_size: int) -> None:
    counts, lengths = [count for count, _ in segments], [count + before for count, before in segments]
    tables, _ = scattered_tables(lengths, block_size)
    rows = list(reversed(range(len(segments))))
    lengths = lengths[::-1]
    batch = device_batch(tables, block_size, counts[::-1], lengths, rows, (), *spare)
    place(batch)
    begin = 0
    for row, count, length in zip(rows, counts[::-1], lengths, strict=True):
        tokens = slice(begin, begin + count)
        assert batch.positions[tokens].tolist() == list(range(length - count, length))
        assert batch.cells[tokens].tolist() == cells_of(tables, block_size, row, length)[-count:].tolist()
        begin += count
    assert not batch.positions[begin:].any()
    assert (batch.cells[begin:] == -1).all()


def one_batch(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> tuple[list[Tensor], Tensor, Rotation]:
    """q, k and v as parts of one matrix, that matrix, and how to rotate."""
    tokens = 8
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    fused = random(tokens, sum(widths)).to(dtype)
    parts = [part.view(tokens, -1, head_dim) for part in fused.split(widths, dim=1)]
    angles = random(64, head_dim // 2)
    norms = [(1 + 0.3 * random(head_dim)).to(dtype) for _ in range(2)]
    return parts, fused, Rotation(angles.cos(), angles.sin(), *norms, eps=1e-3)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, FP8),
        (torch.float32, INT8),
        (torch.bfloat16, INT8),
    ],
)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 32), (3, 3, 80)])
def test_rotated_and_stored_is_what_the_operations_give(
    dtype: torch.dtype, stored: torch.dtype, has_norm: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    (q, k, v), fused, rotation = one_batch(dtype, heads, kv_heads, head_dim)
    if not has_norm:
        rotation = Rotation(rotation.cos, rotation.sin)
    counts, lengths, block_size = [4, 1], [21, 16], 16
    tables, num_blocks = scattered_tables(lengths, block_size)
    batch = device_batch(
        tables, block_size, counts, lengths, mirrors=[(2, 1, 5), (-1, 0, 0), (4, 1, 15)], spare_tokens=3
    )
    place(batch)
    keys, values = torch.full((2, num_blocks * block_size, kv_heads, head_dim), 9.0, device=DEVICE).to(stored)
    scales = None
    if stored in (FP8, INT8):
        of_keys, of_values = torch.ones(2, num_blocks * block_size * kv_heads, dtype=torch.bfloat16, device=DEVICE)
        scales = of_keys, of_values

    position = batch.positions.long()
    wide = [x.float() for x in (q, k)]
    if has_norm:
        assert rotation.q_norm is not None and rotation.k_norm is not None
        norms = zip((q, k), (rotation.q_norm, rotation.k_norm), strict=True)
        wide = [REFERENCE.rms_norm(x, weight, rotation.eps).float() for x, weight in norms]
    cos, sin = rotation.cos[position], rotation.sin[position]
    q_expected, k_expected = (REFERENCE.rope(x, cos, sin).to(dtype) for x in wide)
    before = fused.clone()
    store(batch, k, v, keys, values, scales, q, rotation)

    live = 5
    ulp = torch.finfo(dtype).eps
    assert torch.allclose(q[:live].float(), q_expected[:live].float(), atol=4 * ulp, rtol=2 * ulp)
    width = heads * head_dim
    assert torch.equal(fused[:, width:], before[:, width:]), "k and v stay as they are"
    assert torch.equal(fused[live:], before[live:]), "there is no token"
    assert not torch.equal(fused[:live, :width], before[:live, :width])
    ulp = max(ulp, 0.0 if stored is INT8 else torch.finfo(stored).eps)
    mirrored = [1 * block_size + 5, 1 * block_size + 15]
    cells = [*batch.cells[:live].tolist(), *mirrored]
    tokens = [*range(live), 2, 4]
    for which, (data, new) in enumerate(((keys, k_expected), (values, v))):
        found, step = data.float(), 0.0
        if scales is not None:
            of = scales[which].float().view(-1, kv_heads, 1)
            step, found = 0.6 * float(of[cells].max()), found * of
        if stored is FP8:
            step *= 2**-9
        assert torch.allclose(found[cells], new[tokens].float(), atol=4 * ulp + step, rtol=2 * ulp)
        assert torch.equal(found[mirrored], found[cells][[2, 4]])
        untouched = torch.ones(len(data), dtype=torch.bool, device=DEVICE)
        untouched[cells] = False
        assert (data[untouched].float() == 9.0).all()
    if scales is None:
        assert torch.equal(values[cells].float(), v[tokens].to(stored).float())
    else:
        kept, of = quantise(v[tokens], stored)
        assert torch.equal(values[cells].float(), kept.float())
        assert torch.equal(scales[1].view(-1, kv_heads, 1)[cells], of)


def test_stored_without_rotation_it_is_as_it_was() -> None:
    k, v = random(5, 2, 48).bfloat16(), random(5, 2, 48).bfloat16()
    tables, num_blocks = scattered_tables([20], 16)
    batch = device_batch(tables, 16, [5], [20], mirrors=[(0, 2, 3)])
    place(batch)
    keys, values = torch.zeros(2, num_blocks * 16, 2, 48, dtype=torch.bfloat16, device=DEVICE)
    store(batch, k, v, keys, values)
    cells = [*batch.cells.tolist(), 35]
    assert torch.equal(keys[cells], k[[0, 1, 2, 3, 4, 0]])
    assert torch.equal(values[cells], v[[0, 1, 2, 3, 4, 0]])
    assert int((keys != 0).any(-1).any(-1).sum()) == 6


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_8_bits_are_those_of_the_specification(dtype: torch.dtype) -> None:
    k = (
        random(9, 2, 48)
        * torch.tensor([1e-42, 1e-20, 1e-3, 1.0, 40.0, 1e4, 1e30, 0.0, 1.0], device=DEVICE)[:, None, None]
    )
    k[8, 0, 5], k[8, 1, 7] = torch.inf, torch.nan
    tables, num_blocks = scattered_tables([9], 16)
    batch = device_batch(tables, 16, [9], [9])
    place(batch)
    keys, values = torch.zeros(2, num_blocks * 16, 2, 48, device=DEVICE).to(dtype)
    of_keys, of_values = torch.zeros(2, num_blocks * 16 * 2, dtype=torch.bfloat16, device=DEVICE)
    store(batch, k, -k, keys, values, (of_keys, of_values))
    cells = batch.cells.long()
    for data, scales, x in ((keys, of_keys, k), (values, of_values, -k)):
        kept, of = quantise(x, dtype)
        found = scales.view(-1, 2, 1)[cells]
        assert torch.equal(found[:8], of[:8]) and not found[8].isfinite().any()
        assert torch.equal(data[cells[:8]].float(), kept[:8].float()) and data[cells].float().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8, INT8])
def test_blocks_and_cells_are_copied_in_all_layers(dtype: torch.dtype) -> None:
    shape = CacheShape(3, 16, 2, 40, dtype)
    ours, plain = TritonKVCache(shape, 9, DEVICE), TorchKVCache(shape, 9, DEVICE)
    ours._data.copy_(random(*ours._data.shape))
    ours._scales.copy_(random(*ours._scales.shape))
    words = plain._data.view(torch.int32)
    words.copy_(ours._data.view(torch.int32))
    plain._scales.copy_(ours._scales)
    blocks, cells = [(0, 5), (8, 2), (3, 1)], [(0, 100), (47, 33), (143, 5)]
    ours.copy_blocks(blocks)
    ours.copy_cells_on_device(on_device([(-1, 0), *cells, (-1, -1)]))
    for (source, destination), size in [(pair, 16) for pair in blocks] + [(pair, 1) for pair in cells]:
        for each in (words, plain._scales):
            rows = each.view(3, 2, 9 * 16 // size, -1)
            rows[:, :, destination] = rows[:, :, source]
    assert torch.equal(ours._data.view(torch.int32), words)
    assert torch.equal(ours._scales, plain._scales)


def test_places_beyond_2_31_numbers_are_found() -> None:
    """As large caches of 8 bits have them; on a CPU, memory that nobody writes takes none."""
    shape = CacheShape(1, 16, 8, 128, INT8)
    count = (1 << 31) // (16 * 8 * 128) + 3
    k, v, q = random(5, 8, 128), random(5, 8, 128), random(5, 16, 128)
    attended = []
    for blocks, last in ((count, count - 1), (3, 2)):
        cache = TritonKVCache(shape, blocks, DEVICE)
        batch = device_batch(on_device([[last - 1, last]]), 16, [5], [20])
        place(batch)
        plan = cache.plan_on_device(batch, 20, prompt=False)
        plan.store(0, k, v)
        cache.copy_blocks([(last, last - 2)])
        cache.copy_cells([(last * 16 + 3, (last - 1) * 16 + 2)])
        assert cache._data[0, 1, last].any() and torch.equal(cache._data[0, :, last], cache._data[0, :, last - 2])
        attended.append(plan.attend(0, q, 0.1))
    assert attended[0].isfinite().all() and torch.equal(*attended)


def test_a_row_wider_than_a_program_is_copied_whole() -> None:
    data = random(2, 2, 3, 2500)
    expected = data.clone()
    expected[:, :, 2] = expected[:, :, 1]
    copy_rows(data, on_device([(1, 2)]))
    assert torch.equal(data, expected)


@settings(max_examples=8)
@given(
    places=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99)), max_size=300, unique=True),
    spare=st.integers(1, 9),
)
def test_tables_change_where_it_is_said(places: list[tuple[int, int]], spare: int) -> None:
    tables = on_device([[7] * 100] * 6)
    expected = tables.clone()
    for block, (row, column) in enumerate(places):
        expected[row, column] = block
    changes = [(row, column, block) for block, (row, column) in enumerate(places)] + [(-1, 0, 99)] * spare
    update_tables(tables, on_device(changes))
    assert torch.equal(tables, expected)
