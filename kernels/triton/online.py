"""An online softmax over keys: of a row is known its largest score so far, the sum of weights, and that of values."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def finish(best, total, acc, sink, HAS_SINKS: tl.constexpr):
    """The weighted mean: a sink is one more key without a value."""
    if HAS_SINKS:
        highest = tl.maximum(best, sink)
        fade = tl.exp2(best - highest)
        total = tl.fma(total, fade, tl.exp2(sink - highest))
        acc = acc * fade[:, None]
    return acc / total[:, None]


@triton.jit
def join(best, total, acc, best_next, total_next, acc_next):
    """Adds the next split to those before it."""
    highest = tl.maximum(best, best_next)
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    fade, fade_next = tl.exp2(best - safe), tl.exp2(best_next - safe)
    total = tl.fma(total, fade, total_next * fade_next)
    acc = tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), acc_next * fade_next[:, None])
    return highest, total, acc


@triton.jit
def widened(x, dtype: tl.constexpr):
    if x.dtype == tl.int8:  # by way of float32: not every conversion from whole numbers is there
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def visit_keys(
    queries,
    position,
    low,
    high,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_head,
    scale,
    softcap,
    window,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OPERAND: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Attention over the keys low … high - 1, where low is a multiple of CHUNK.

    Returns the largest score of each row in powers of two, the sum of 2 ** (score - largest), and with it as weight
    the sum of values; minus infinity and zeros for a row that sees none of these keys.
    """
    ROWS: tl.constexpr = queries.shape[0]
    WIDTH: tl.constexpr = queries.shape[1]
    d = tl.arange(0, WIDTH)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for base in tl.range(low, high, CHUNK):
        key = base + tl.arange(0, CHUNK)
        there = key < high
        block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
        at = place * HEAD_DIM
        k = tl.load(keys + at[None, :] + d[:, None], mask=there[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(queries, widened(k, OPERAND), input_precision="ieee")
        if HAS_SCALES:
            scores *= tl.load(key_scales + place, mask=there, other=0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            scores = (softcap * LOG2_E) * (1.0 - 2.0 / (tl.exp2(scores * (scale * 2.0 * LOG2_E / softcap)) + 1.0))
        else:
            scores *= scale * LOG2_E
        seen = key[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -float("inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(highest == -float("inf"), 0.0, highest)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(best - safe)
        total = tl.fma(total, fade, tl.sum(weights, 1))
        v = tl.load(values + at[:, None] + d[None, :], mask=there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        if HAS_SCALES:
            weights *= tl.load(value_scales + place, mask=there, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(OPERAND), widened(v, OPERAND), acc * fade[:, None], input_precision="ieee")
        best = highest
    return best, total, acc


@triton.jit
def store_part(parts, part_stats, slot, best, total, acc, live, stored, HEAD_DIM: tl.constexpr):
    """What one split gives, at a place of its own for each row."""
    d = tl.arange(0, acc.shape[1])
    tl.store(parts + (slot * HEAD_DIM)[:, None] + d[None, :], acc, mask=stored)
    tl.store(part_stats + slot * 2, best, mask=live)
    tl.store(part_stats + slot * 2 + 1, total, mask=live)
