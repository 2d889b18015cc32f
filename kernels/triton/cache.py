"""What is done with places in the paged cache: finding them, storing keys and values, copying, and changing tables.

Layers lie as ``TorchKVCache`` lays them: tokens as rows [kv_heads, head_dim], ``block_size`` of them in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.device_batch import DeviceBatch


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def find_places(
    q_start,
    kv_len,
    table_row,
    block_tables,
    positions,
    cells,
    token_ids,
    latest,
    num_tokens,
    num_segments,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    SEARCH: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_LATEST: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # The segments that end at or before a token are those before its own: low … high are how many they may be.
    low = tl.zeros([TOKENS], tl.int32)
    high = low + num_segments
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        ends = tl.load(q_start + 1 + middle, mask=low < high, other=0)
        is_past = (ends <= token) & (low < high)
        low = tl.where(is_past, middle + 1, low)
        high = tl.where(is_past, high, tl.minimum(middle, high))
    there = (low < num_segments) & (token < num_tokens)
    end = tl.load(q_start + 1 + low, mask=there, other=0)
    position = tl.load(kv_len + low, mask=there, other=0) - (end - token)
    row = tl.load(table_row + low, mask=there, other=0).to(tl.int64)
    block = tl.load(block_tables + row * table_stride + position // BLOCK_SIZE, mask=there, other=0)
    tl.store(positions + token, tl.where(there, position, 0), mask=token < num_tokens)
    cell = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(cells + token, tl.where(there, cell, -1), mask=token < num_tokens)
    if HAS_LATEST:
        known = tl.load(token_ids + token, mask=token < num_tokens, other=0)
        is_late = (known < 0) & (token < num_tokens)
        tl.store(token_ids + token, tl.load(latest - 1 - known, mask=is_late, other=0), mask=is_late)


def place(batch: DeviceBatch) -> None:
    """Fills ``positions`` and ``cells`` from the other arrays of the batch, and in token ids that were not known."""
    tokens = 128
    find_places[(triton.cdiv(batch.num_tokens, tokens),)](
        *(batch.q_start, batch.kv_len, batch.table_row, batch.block_tables, batch.positions, batch.cells),
        *(batch.token_ids, batch.latest, batch.num_tokens, batch.num_segments, batch.block_tables.stride(0)),
        BLOCK_SIZE=batch.block_size,
        SEARCH=max(9, batch.num_segments.bit_length()),  # each number is compiled
        TOKENS=tokens,
        HAS_LATEST=batch.latest is not None,
        num_warps=4,
    )


@triton.jit
def load_halves(base, weight, eps, h, HALF: tl.constexpr, HAS_NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The first and the second half of heads base [heads, 1] in float32, normed over both if there is a weight."""
    inside = h < HALF
    a = tl.load(base + h, mask=inside, other=0.0)
    b = tl.load(base + HALF + h, mask=inside, other=0.0)
    kind: tl.constexpr = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if HAS_NORM:  # rounds where the plain norm does
        square = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
        by = tl.rsqrt(square + eps)[:, None]
        of_a = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
        of_b = tl.load(weight + HALF + h, mask=inside, other=0.0).to(tl.float32)
        if PLUS_ONE:
            a, b = a * by * (1.0 + of_a), b * by * (1.0 + of_b)
        else:
            a, b = (a * by).to(kind).to(tl.float32) * of_a, (b * by).to(kind).to(tl.float32) * of_b
        a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
    return a, b


@triton.jit
def scale_of(largest, missing, dtype: tl.constexpr):
    """What numbers up to ``largest`` are divided by: a bfloat16, rounded upwards, as in ``kv_cache.quantise``."""
    wanted = tl.div_rn(largest, 127.0 if dtype == tl.int8 else 448.0)
    rounded = ((wanted.to(tl.int32, bitcast=True) + 0xFFFF) >> 16) << 16
    return tl.where(missing > 0, float("nan"), rounded.to(tl.float32, bitcast=True))


@triton.jit
def narrowed(x, scale, dtype: tl.constexpr):
    """x divided by its scale, as a number of ``dtype``."""
    x = tl.div_rn(x, scale)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    if dtype == tl.int8:  # which leaves digits behind the point away, and that sum has none
        x = (x + 12582912.0) - 12582912.0
    return x.to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def store_token(
    q,
    k,
    v,
    keys,
    values,
    cells,
    mirrors,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    key_scales,
    value_scales,
    num_tokens,
    q_stride,
    k_stride,
    v_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """One KV head of one token with its query heads, or the KV head alone for a mirror of a token."""
    place, kv_head = tl.program_id(0), tl.program_id(1)
    is_mirror = place >= num_tokens
    if is_mirror:
        mirror = mirrors + (place - num_tokens) * 3
        token = tl.load(mirror)
        cell = tl.load(mirror + 1) * BLOCK_SIZE + tl.load(mirror + 2)
        cell = tl.where(token < 0, -1, cell)
    else:
        token = place
        cell = tl.load(cells + place)
    if cell < 0:
        return
    token = token.to(tl.int64)
    to = (cell.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    h = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    inside = h < HALF
    one = tl.zeros([1, 1], tl.int64)
    a, b = load_halves(k + token * k_stride + kv_head * HEAD_DIM + one, k_norm, eps, h, HALF, HAS_NORM, PLUS_ONE)
    if HAS_ROPE:
        at = tl.load(positions + token).to(tl.int64) * HALF + h
        c, s = tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)
        if not is_mirror:
            g = tl.arange(0, triton.next_power_of_2(GROUP))[:, None]
            base = q + token * q_stride + (kv_head * GROUP + tl.minimum(g, GROUP - 1)) * HEAD_DIM
            first, second = load_halves(base, q_norm, eps, h, HALF, HAS_NORM, PLUS_ONE)
            written = (g < GROUP) & inside
            tl.debug_barrier()  # all threads have read before any of them writes to the same place
            tl.store(base + h, (first * c - second * s).to(q.dtype.element_ty), mask=written)
            tl.store(base + HALF + h, (second * c + first * s).to(q.dtype.element_ty), mask=written)
        kind: tl.constexpr = k.dtype.element_ty  # rounded to it before the cache's, as where the two are apart
        a, b = (a * c - b * s).to(kind).to(tl.float32), (b * c + a * s).to(kind).to(tl.float32)
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    value = tl.load(v + token * v_stride + kv_head * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    stored: tl.constexpr = keys.dtype.element_ty
    if HAS_SCALES:
        largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
        missing = tl.sum((a != a).to(tl.int32) + (b != b).to(tl.int32), 1)
        of_key = scale_of(largest, missing, stored)
        of_value = scale_of(tl.max(tl.abs(value), 0), tl.sum((value != value).to(tl.int32), 0), stored)
        place = cell.to(tl.int64) * KV_HEADS + kv_head
        tl.store(key_scales + place + tl.zeros([1], tl.int32), of_key.to(tl.bfloat16))
        tl.store(value_scales + place, of_value.to(tl.bfloat16))
        a, b = narrowed(a, of_key[:, None], stored), narrowed(b, of_key[:, None], stored)
        value = narrowed(value, of_value, stored)
    tl.store(keys + to + h, a.to(stored), mask=inside)
    tl.store(keys + to + HALF + h, b.to(stored), mask=inside)
    tl.store(values + to + d, value.to(stored), mask=d < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is done to queries and keys before they are used: rotated by position, each head normed before that.

    ``cos`` and ``sin`` are [positions, head_dim / 2] float32 (Su et al. 2021; element i pairs with element
    i + head_dim / 2). The norms are [head_dim], or None (Henry et al. 2020); with ``plus_one`` as Gemma's are.
    """

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    plus_one: bool = False


def store(
    batch: DeviceBatch,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    q: Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    """Writes k and v of the batch's tokens to their cells, and at their mirrors.

    Args:
        batch: placed.
        k, v: [tokens, kv_heads, head_dim]; tokens may be any distance apart. They stay as they are.
        keys, values: [cells, kv_heads, head_dim] of one layer, contiguous.
        scales: [cells * kv_heads] bfloat16 each, for what keys and what values are divided by; where they have 8 bits.
        q: [tokens, heads, head_dim] in the dtype of k, which is rotated in place.
        rotation: of q, and of what is stored of k; both or neither are given.
    """
    kv_heads, head_dim = k.shape[1:]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != head_dim)):
            raise ValueError(f"the heads of a token of {name} must lie beside each other; its strides are {x.stride()}")
    assert (q is None) == (rotation is None)
    group = 1 if q is None else q.shape[1] // kv_heads
    has_norm = rotation is not None and rotation.q_norm is not None
    store_token[batch.num_tokens + len(batch.mirrors), kv_heads](
        *(q, k, v, keys, values, batch.cells, batch.mirrors, batch.positions),
        *((None,) * 4 if rotation is None else (rotation.cos, rotation.sin, rotation.q_norm, rotation.k_norm)),
        *(0.0 if rotation is None else rotation.eps, *(scales or (None, None)), batch.num_tokens),
        *(0 if q is None else q.stride(0), k.stride(0), v.stride(0)),
        GROUP=group,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=batch.block_size,
        HAS_ROPE=rotation is not None,
        HAS_NORM=has_norm,
        PLUS_ONE=rotation is not None and has_norm and rotation.plus_one,
        HAS_SCALES=scales is not None,
        num_warps=1 if group * head_dim <= 512 else 4,
    )


@triton.jit
def copy_row(data, pairs, rows, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    pair = pairs + tl.program_id(0) * 2
    source, destination = tl.load(pair), tl.load(pair + 1)
    if source < 0:
        return
    layer = tl.program_id(1).to(tl.int64) * rows
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    row = tl.load(data + (layer + source) * WIDTH + word, mask=word < WIDTH)
    tl.store(data + (layer + destination) * WIDTH + word, row, mask=word < WIDTH)


def copy_rows(data: Tensor, pairs: Tensor) -> None:
    """Copies rows in all layers, for keys and values: blocks or cells, by the view of data.

    Args:
        data: [layers, 2, rows, width], contiguous; a row takes a multiple of 2 bytes.
        pairs: [n, 2] int32, (source, destination) each; a source of -1 for none. No destination is a source as well.
    """
    words = data.view(torch.int16 if data.shape[3] * data.itemsize % 4 else torch.int32)
    layers, _, rows, width = words.shape
    part = min(1024, triton.next_power_of_2(width))
    copy_row[len(pairs), layers * 2, triton.cdiv(width, part)](
        words, pairs, rows, WIDTH=width, WORDS=part, num_warps=max(1, min(8, part // 128))
    )


@triton.jit(do_not_specialize=["count"])
def change_table(tables, changes, count, stride, CHANGES: tl.constexpr):
    change = tl.program_id(0) * CHANGES + tl.arange(0, CHANGES)
    row = tl.load(changes + change * 3, mask=change < count, other=-1)
    column = tl.load(changes + change * 3 + 1, mask=row >= 0)
    block = tl.load(changes + change * 3 + 2, mask=row >= 0)
    tl.store(tables + row.to(tl.int64) * stride + column, block, mask=row >= 0)


def update_tables(tables: Tensor, changes: Tensor) -> None:
    """Writes blocks to tables [rows, blocks] int32.

    ``changes`` is [n, 3] int32: row, column and block each; a row of -1 for none, and no place twice.
    """
    part = 128
    change_table[(triton.cdiv(len(changes), part),)](
        tables, changes, len(changes), tables.stride(0), CHANGES=part, num_warps=1
    )
