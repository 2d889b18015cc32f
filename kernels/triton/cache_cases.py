"""Cases of Triton's paged cache and the attention over it; see ``slipstream.kernels.cases``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from slipstream.kernels import reference
from slipstream.kernels.attention.choice import against, wanted
from slipstream.kernels.batch import Int32
from slipstream.kernels.cases import Case, Outputs, Prepared, Sizes, Source, attention, called, size
from slipstream.kernels.kv_cache import LARGEST, CacheShape, as_kept
from slipstream.kernels.triton import cache
from slipstream.kernels.triton.attention import LONGEST_ROWS
from slipstream.kernels.triton.device_batch import DeviceBatch
from slipstream.kernels.triton.kv_cache import TritonKVCache

FLOAT32 = (torch.float32,)
_PLAIN = reference.ReferenceOps()
Norm = Callable[[Tensor, Tensor, float], Tensor]


def cases(device: torch.device) -> Iterator[Case]:
    yield from attention(TritonKVCache)
    yield Case("attention decode, in a graph of 4 times the reach", _recorded_decode)
    yield Case("attention, tiles of prompts", _prompt_attention)
    yield Case("rotate and store", _rotate_and_store)
    for kept in LARGEST:
        if against("triton", wanted(CacheShape(1, 16, 1, 64, kept), torch.bfloat16, device)):
            continue
        name = f"cache in {str(kept).removeprefix('torch.')}"
        yield Case(f"attention decode, {name}", partial(_recorded_decode, kept=kept))
        yield Case(f"attention, tiles of prompts, {name}", partial(_prompt_attention, kept=kept))
        yield Case(f"rotate and store, {name}", partial(_rotate_and_store, kept=kept))
    yield Case("rotate and store, normed", partial(_rotate_and_store, norm=_PLAIN.rms_norm))
    yield Case("rotate and store, Gemma's norms", partial(_rotate_and_store, norm=_PLAIN.rms_norm_plus_one))
    yield Case("copy blocks", _copy_blocks)
    yield Case("place tokens", _place, FLOAT32)
    yield Case("change tables", _update_tables, FLOAT32)


def device_batch(source: Source, counts: list[int], lengths: list[int], block_size: int) -> tuple[DeviceBatch, int]:
    """Placed, and how many blocks its sequences take."""
    batch, blocks = source.batch(counts, lengths, block_size)

    def staged(array: Int32) -> Tensor:
        return torch.from_numpy(array).to(source.device)

    found = DeviceBatch(
        token_ids=staged(batch.token_ids),
        q_start=staged(batch.q_start),
        kv_len=staged(batch.kv_len),
        table_row=staged(batch.table_row),
        mirrors=staged(batch.mirrors),
        block_tables=staged(batch.block_tables),
        positions=staged(np.zeros_like(batch.positions)),
        cells=staged(np.zeros_like(batch.positions)),
        block_size=block_size,
    )
    cache.place(found)
    return found, blocks


def _recorded_decode(source: Source, sizes: Sizes, kept: torch.dtype | None = None) -> Prepared:
    """As steps are served: launched for longer sequences than there are, whose keys nobody has."""
    lengths = [sizes.context] * sizes.streams
    batch, blocks = device_batch(source, lengths, lengths, sizes.block_size)
    cached = _cache(source, sizes, blocks, kept)
    k, v = (source.normal(sum(lengths), sizes.kv_heads, sizes.head_dim) for _ in range(2))
    cached.plan_on_device(batch, sizes.context, prompt=False).store(0, k, v)
    starts = torch.arange(sizes.streams + 1, dtype=torch.int32, device=source.device)
    step = replace(batch, q_start=starts, token_ids=starts[:-1], positions=starts[1:].clone(), cells=starts[1:].clone())
    cache.place(step)
    plan = cached.plan_on_device(step, 4 * sizes.context, prompt=False)
    q = source.normal(sizes.streams, sizes.heads, sizes.head_dim)
    scale = sizes.head_dim**-0.5

    def expected() -> Tensor:
        keys, values = (as_kept(x, kept).split(lengths) for x in (k, v))
        rows = zip(q.float().split(1), keys, values, strict=True)
        return torch.cat([reference.attention(*row, scale) for row in rows])

    flops = 4 * sizes.heads * sizes.head_dim * sum(lengths)
    moved = 2 * size(q) + sum(lengths) * cached.block_bytes(cached.shape) // sizes.block_size
    return called(lambda: plan.attend(0, q, scale), expected, moved, flops)


def _prompt_attention(source: Source, sizes: Sizes, kept: torch.dtype | None = None) -> Prepared:
    count = sizes.chunk
    batch, blocks = device_batch(source, [count], [count], sizes.block_size)
    row_tokens = 0 if count > LONGEST_ROWS else None  # as where the host plans: nothing is launched for rows
    plan = _cache(source, sizes, blocks, kept).plan_on_device(batch, count, True, row_tokens)
    k, v = (source.normal(count, sizes.kv_heads, sizes.head_dim) for _ in range(2))
    q = source.normal(count, sizes.heads, sizes.head_dim)
    plan.store(0, k, v)
    scale = sizes.head_dim**-0.5
    flops = 4 * sizes.heads * sizes.head_dim * count * (count + 1) // 2
    return called(
        lambda: plan.attend(0, q, scale),
        lambda: reference.attention(q.float(), as_kept(k, kept), as_kept(v, kept), scale),
        2 * size(q) + size(k, v),
        flops,
    )


def _rotate_and_store(
    source: Source, sizes: Sizes, norm: Norm | None = None, kept: torch.dtype | None = None
) -> Prepared:
    """What is stored is read by attention of one token to itself, whose queries are those that were rotated; not where
    it is ``kept`` in 8 bits, which other cases read."""
    batch, blocks = device_batch(source, [sizes.tokens], [sizes.tokens], sizes.block_size)
    cached = _cache(source, sizes, blocks, kept)
    plan = cached.plan_on_device(batch, sizes.tokens, prompt=False)
    angle = source.normal(sizes.tokens, sizes.head_dim // 2, dtype=torch.float32)
    norms = [None if norm is None else 0.1 * source.normal(sizes.head_dim) for _ in range(2)]
    is_gemma = norm == _PLAIN.rms_norm_plus_one
    rotation = cache.Rotation(angle.cos(), angle.sin(), norms[0], norms[1], 1e-5, is_gemma)
    k, v = (source.normal(sizes.tokens, sizes.kv_heads, sizes.head_dim) for _ in range(2))
    q = source.normal(sizes.tokens, sizes.heads, sizes.head_dim)
    group = sizes.heads // sizes.kv_heads

    def found() -> Outputs:
        rotated = q.clone()
        plan.rotate_and_store(0, rotated, k, v, rotation)
        keys, values = (each[batch.cells.long()] for each in cached._data.view(2, -1, sizes.kv_heads, sizes.head_dim))
        if kept is not None:
            scales = cached._scales.view(2, -1, sizes.kv_heads, 1)[:, batch.cells.long()].float()
            _, wide_keys, wide_values = expected()
            keys = _settled(keys.float(), scales[0], wide_keys, kept)
            values = _settled(values.float(), scales[1], wide_values, kept)
            return rotated, keys, values
        return rotated, keys, values, plan.attend(0, rotated, 0.1, window=1)

    def expected() -> Outputs:
        wide = [
            x.float() if norm is None or weight is None else norm(x.float(), weight.float(), 1e-5)
            for x, weight in zip((q, k), norms, strict=True)
        ]
        turned = [_PLAIN.rope(x, rotation.cos, rotation.sin) for x in wide]
        shown = () if kept is not None else (v.float().repeat_interleave(group, 1),)
        return (*turned, v.float(), *shown)

    again = q.clone()
    moved = 2 * size(q) + 4 * size(k) + 2 * size(angle)
    return Prepared(lambda: plan.rotate_and_store(0, again, k, v, rotation), found, expected, moved)


def _settled(numbers: Tensor, scales: Tensor, exact: Tensor, kept: torch.dtype) -> Tensor:
    """What is exact where kept numbers are as near to it as the format has them, by scales as they are to be.

    One that lies between two of them may become either, as roundings before that differ.
    """
    wanted = exact.abs().amax(-1, keepdim=True) / LARGEST[kept]
    half = 0.5 * scales if kept is torch.int8 else torch.maximum(exact.abs() / 16, scales / 1024)
    is_near = (numbers * scales - exact).abs() <= 1.02 * half + exact.abs() / 200
    return torch.where(is_near & ((scales / wanted - 1).abs() < 0.02), exact, numbers * scales)


def _cache(source: Source, sizes: Sizes, blocks: int, kept: torch.dtype | None) -> TritonKVCache:
    shape = CacheShape(1, sizes.block_size, sizes.kv_heads, sizes.head_dim, kept or source.dtype)
    return TritonKVCache(shape, blocks, source.device)


def _copy_blocks(source: Source, sizes: Sizes) -> Prepared:
    count = max(sizes.streams, 2)
    shape = CacheShape(2, sizes.block_size, sizes.kv_heads, sizes.head_dim, source.dtype)
    width = sizes.block_size * sizes.kv_heads * sizes.head_dim
    data = source.normal(2, 2, 2 * count, width)
    pairs = torch.stack((torch.arange(count), torch.arange(count) + count), 1).int().to(source.device)
    pairs[0, 0] = -1

    def found() -> Tensor:
        copied = data.clone()
        cache.copy_rows(copied, pairs)
        return copied

    def expected() -> Tensor:
        copied = data.float()
        copied[:, :, count + 1 :] = copied[:, :, 1:count]
        return copied

    once = data.clone()
    moved = 2 * (count - 1) * 4 * width * source.dtype.itemsize
    assert shape.num_layers == len(data)
    return Prepared(lambda: cache.copy_rows(once, pairs), lambda: (found(),), lambda: (expected(),), moved)


def _place(source: Source, sizes: Sizes) -> Prepared:
    counts = [sizes.chunk, *[1] * sizes.streams]
    lengths = [sizes.chunk, *[sizes.context] * sizes.streams]
    batch, _ = device_batch(source, counts, lengths, sizes.block_size)

    def found() -> Outputs:
        cache.place(batch)
        return batch.positions, batch.cells

    def expected() -> Outputs:
        ends = list(zip(counts, lengths, strict=True))
        positions = torch.cat([torch.arange(length - count, length) for count, length in ends])
        row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        block = batch.block_tables.cpu()[row, positions // sizes.block_size]
        return positions, block * sizes.block_size + positions % sizes.block_size

    return Prepared(found, found, expected, 3 * size(batch.positions))


def _update_tables(source: Source, sizes: Sizes) -> Prepared:
    tables = torch.zeros(sizes.streams, 64, dtype=torch.int32, device=source.device)
    changed = torch.stack(
        [torch.arange(sizes.streams), torch.arange(sizes.streams) % 64, torch.arange(sizes.streams) + 7], 1
    )
    changes = torch.cat((changed, torch.full((1, 3), -1))).int().to(source.device)

    def expected() -> Tensor:
        made = torch.zeros_like(tables)
        made[changed[:, 0], changed[:, 1]] = changed[:, 2].int().to(source.device)
        return made

    def found() -> Tensor:
        cache.update_tables(tables, changes)
        return tables

    return called(found, expected, size(changes))
