"""What tokens are sampled from, without sorting: borders are found by search among the floats themselves.

Floats in order are integers, so that a border is found exactly, in a bounded number of steps: each counts (for top-k)
or sums (for top-p) what is at least as large as three values between the bounds, and so quarters their distance. As
soon as few values are left between the bounds, these are put aside and held in registers. One program has a row, and
all sums go in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton import launch

ROOM = 2048
"""Values that are put aside."""


@triton.jit
def order_of(x):
    """An int32 for a float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_at(order):
    """The float32 whose ``order_of`` this is, whatever the type of integer."""
    bits = order.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(low, high, n_low, n_high, m_high, p1, p2, p3, n1, n2, n3, m1, m2, m3, wanted, MASS: tl.constexpr):
    """The bounds after a step: the largest value known to be enough, and the smallest known not to be."""
    if MASS:
        e1, e2, e3 = m1 >= wanted, m2 >= wanted, m3 >= wanted
    else:
        e1, e2, e3 = n1 >= wanted, n2 >= wanted, n3 >= wanted
    new_low = tl.where(e3, p3, tl.where(e2, p2, tl.where(e1, p1, low)))
    new_high = tl.where(e3, high, tl.where(e2, p3, tl.where(e1, p2, p1)))
    n_low = tl.where(e3, n3, tl.where(e2, n2, tl.where(e1, n1, n_low)))
    n_high = tl.where(e3, n_high, tl.where(e2, n3, tl.where(e1, n2, n1)))
    m_high = tl.where(e3, m_high, tl.where(e2, m3, tl.where(e1, m2, m1)))
    return new_low, new_high, n_low, n_high, m_high


@triton.jit
def search_border(
    values,
    count,
    low,
    high,
    wanted,
    aside,
    FIRST: tl.constexpr,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The largest value of which at least ``wanted`` is as large: values by number, or their sum with ``MASS``.

    Between the orders ``low``, which is enough, and ``high`` (int64), which is not. With ``FIRST`` the first step is
    made where logits differ by so much that it tells, 4 to 16 below the largest; ``high`` is next to that then.
    """
    n_low, n_high, m_high = count, 0, 0.0
    p1, p2, p3 = low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4
    if FIRST:
        top = float_at(high - 1)
        p1 = tl.maximum(order_of(top - 16.0).to(tl.int64), low)
        p2 = tl.maximum(order_of(top - 8.0).to(tl.int64), low)
        p3 = tl.maximum(order_of(top - 4.0).to(tl.int64), low)
    while (high - low > 1) & (n_low - n_high > ROOM):
        v1, v2, v3 = float_at(p1), float_at(p2), float_at(p3)
        c1 = tl.zeros([BLOCK], tl.int32)
        c2 = tl.zeros([BLOCK], tl.int32)
        c3 = tl.zeros([BLOCK], tl.int32)
        s1 = tl.zeros([BLOCK], tl.float32)
        s2 = tl.zeros([BLOCK], tl.float32)
        s3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < count, other=float("-inf")).to(tl.float32)
            c1 += (x >= v1).to(tl.int32)
            c2 += (x >= v2).to(tl.int32)
            c3 += (x >= v3).to(tl.int32)
            if MASS:
                s1 += tl.where(x >= v1, x, 0.0)
                s2 += tl.where(x >= v2, x, 0.0)
                s3 += tl.where(x >= v3, x, 0.0)
        n1, n2, n3 = tl.sum(c1, axis=0), tl.sum(c2, axis=0), tl.sum(c3, axis=0)
        m1, m2, m3 = tl.sum(s1, axis=0), tl.sum(s2, axis=0), tl.sum(s3, axis=0)
        low, high, n_low, n_high, m_high = narrowed(
            low, high, n_low, n_high, m_high, p1, p2, p3, n1, n2, n3, m1, m2, m3, wanted, MASS
        )
        p1, p2, p3 = low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4

    if high - low > 1:
        lowest, highest = float_at(low), float_at(high)
        found = 0
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < count, other=float("-inf")).to(tl.float32)
            kept = (x >= lowest) & (x < highest)
            place = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(aside + place, x, mask=kept & (place < ROOM))
            found += tl.sum(kept.to(tl.int32), axis=0)
        tl.debug_barrier()
        slot = tl.arange(0, ROOM)
        x = tl.load(aside + slot, mask=slot < found, other=float("-inf"))
        n_base, m_base = n_high, m_high
        while (high - low > 1) & (n_low - n_high > 1):
            p1, p2, p3 = low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4
            v1, v2, v3 = float_at(p1), float_at(p2), float_at(p3)
            n1 = n_base + tl.sum((x >= v1).to(tl.int32), axis=0)
            n2 = n_base + tl.sum((x >= v2).to(tl.int32), axis=0)
            n3 = n_base + tl.sum((x >= v3).to(tl.int32), axis=0)
            m1 = m_base
            m2 = m_base
            m3 = m_base
            if MASS:
                m1 += tl.sum(tl.where(x >= v1, x, 0.0), axis=0)
                m2 += tl.sum(tl.where(x >= v2, x, 0.0), axis=0)
                m3 += tl.sum(tl.where(x >= v3, x, 0.0), axis=0)
            low, high, n_low, n_high, m_high = narrowed(
                low, high, n_low, n_high, m_high, p1, p2, p3, n1, n2, n3, m1, m2, m3, wanted, MASS
            )
        tl.debug_barrier()
    return float_at(low)


@triton.jit
def distribution_kernel(
    logits,
    row_stride,
    out,
    out_stride,
    aside,
    vocab,
    temperatures,
    top_ks,
    min_ps,
    top_ps,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    row = tl.program_id(0)
    given = logits + row.to(tl.int64) * row_stride
    weights = out + row.to(tl.int64) * out_stride
    aside += row.to(tl.int64) * ROOM
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(given + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, x)
    top = tl.max(best, axis=0)
    top_k = tl.load(top_ks + row)
    border = float("-inf")
    if (top_k > 0) & (top_k < vocab):
        high = order_of(top).to(tl.int64) + 1
        low = tl.full([], -2139095040, tl.int64)  # the order of the smallest float
        border = search_border(given, vocab, low, high, top_k, aside, True, False, BLOCK, ROOM)

    temperature = tl.maximum(tl.load(temperatures + row), 1.1754943508222875e-38)
    least = tl.maximum(tl.load(min_ps + row), 1.1754943508222875e-38)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(given + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        w = tl.exp((x - top) / temperature)
        w = tl.where((x >= border) & (w >= least), w, 0.0)
        tl.store(weights + at, w, mask=at < vocab)
        mass += w
    top_p = tl.load(top_ps + row)
    if top_p < 1.0:
        tl.debug_barrier()
        wanted = tl.sum(mass, axis=0) * top_p
        low = order_of(least).to(tl.int64)
        high = order_of(tl.full([], 1.0, tl.float32)).to(tl.int64) + 1
        nucleus = search_border(weights, vocab, low, high, wanted, aside, False, True, BLOCK, ROOM)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            w = tl.load(weights + at, mask=at < vocab, other=0.0)
            tl.store(weights + at, tl.where(w >= nucleus, w, 0.0), mask=at < vocab)


def distribution(
    logits: Tensor, temperature: Tensor, top_k: Tensor, min_p: Tensor, top_p: Tensor, out: Tensor | None = None
) -> Tensor:
    """What ``ops.distribution`` says, without a sort and without waiting for the device; the largest weight is 1.

    A token on the border of the nucleus may go the other way than in the reference, as its mass is summed in another
    order, and weights below 1.2e-38 are 0. Rows that hold what is no number are zeros.

    Args:
        logits: [rows, vocab], float32, bfloat16 or float16, with contiguous rows.
        temperature, top_k, min_p, top_p: [rows]; top_k of integers, the others float32.
        out: [rows, vocab] float32, with contiguous rows; may be the logits themselves.
    """
    rows, vocab = logits.shape
    if out is None:
        out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.stride(1) != 1 or out.stride(1) != 1 or out.dtype is not torch.float32 or not vocab:
        raise ValueError("logits and weights are matrices with contiguous rows that are not empty, weights float32")
    if rows:
        aside = torch.empty(rows, ROOM, dtype=torch.float32, device=logits.device)
        distribution_kernel[(rows,)](
            *(logits, logits.stride(0), out, out.stride(0), aside, vocab),
            *(column.contiguous() for column in (temperature, top_k, min_p, top_p)),
            # The interpreter takes as long for a block of any size.
            BLOCK=triton.next_power_of_2(vocab) if launch.is_interpreted() else 4096,
            ROOM=ROOM,
            num_warps=16,
        )
    return out
