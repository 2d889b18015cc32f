"""Choosing tokens: the most likely one, or one by a random number, which is made on the device too.

Rows are cut into chunks of a fixed size, so that a few rows occupy a whole GPU, and what chunks give is combined in
order: the bits of a row depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Logits that one program looks at."""
DRAW_CHUNK = 2048
"""Weights whose sum one program makes, in double precision."""


@triton.jit
def row_parts_kernel(
    logits, row_stride, vocab, largest, first, mass, chunks, WITH_MASS: tl.constexpr, CHUNK: tl.constexpr
):
    """The largest logit of each chunk (no number if one is none), where it is, and the mass relative to it."""
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=column < vocab, other=float("-inf"))
    x = x.to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), axis=0) > 0
    x = tl.where(x != x, float("-inf"), x)
    top = tl.max(x, axis=0)
    at = row.to(tl.int64) * chunks + part
    tl.store(largest + at, tl.where(broken, float("nan"), top))
    tl.store(first + at, tl.min(tl.where(x == top, column, vocab), axis=0))
    if WITH_MASS:
        is_finite = (top > float("-inf")) & (top < float("inf"))
        tl.store(mass + at, tl.sum(tl.exp(x - tl.where(is_finite, top, 0.0)), axis=0))


@triton.jit
def joined_mass(largest, mass, row, chunks, PARTS: tl.constexpr):
    """The largest of a row, whether it is one to choose, and the row's mass relative to it."""
    part = tl.arange(0, PARTS)
    at = row.to(tl.int64) * chunks + part
    tops = tl.load(largest + at, mask=part < chunks, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), axis=0) > 0
    tops = tl.where(tops != tops, float("-inf"), tops)
    top = tl.max(tops, axis=0)
    is_finite = (top > float("-inf")) & (top < float("inf")) & (broken == 0)
    masses = tl.load(mass + at, mask=part < chunks, other=0.0)
    factors = tl.exp(tops - tl.where(is_finite, top, 0.0))
    total = tl.sum(tl.where(tops > float("-inf"), masses * factors, 0.0), axis=0)
    return top, is_finite, tl.where(is_finite, total, 1.0)


@triton.jit
def argmax_kernel(largest, first, mass, out, likely, chunks, WITH_MASS: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    at = row.to(tl.int64) * chunks + part
    tops = tl.load(largest + at, mask=part < chunks, other=float("-inf"))
    broken = tl.max((tops != tops).to(tl.int32), axis=0) > 0
    tops = tl.where(tops != tops, float("-inf"), tops)
    top = tl.max(tops, axis=0)
    is_finite = (top > float("-inf")) & (top < float("inf")) & (broken == 0)
    places = tl.load(first + at, mask=part < chunks, other=0)
    found = tl.min(tl.where((tops == top) & (part < chunks), places, 2147483647), axis=0)
    tl.store(out + row, tl.where(is_finite, found, -1))
    if WITH_MASS:
        _, _, total = joined_mass(largest, mass, row, chunks, PARTS)
        tl.store(likely + row, tl.where(is_finite, 1.0 / total, 0.0))


def row_parts(logits: Tensor, with_mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Largest, first place of it, and mass relative to it (or nothing), of every chunk of logits [rows, vocab]."""
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or not vocab:
        raise ValueError("logits are a matrix with contiguous rows that are not empty")
    chunks = triton.cdiv(vocab, CHUNK)
    largest = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    first = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    mass = torch.empty_like(largest) if with_mass else largest
    if rows:
        row_parts_kernel[(rows, chunks)](
            *(logits, logits.stride(0), vocab, largest, first, mass, chunks),
            WITH_MASS=with_mass,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return largest, first, mass


def argmax(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Index of the first largest of each row of logits [rows, vocab], float32, bfloat16 or float16.

    -1 where it is not finite or the row holds no number somewhere. ``out`` [rows] int64 or int32; by default int64.
    """
    return _argmax(logits, out, None)


def argmax_with_probability(
    logits: Tensor, out: Tensor | None = None, likely: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What ``argmax`` returns, and the probability of each token at temperature 1 [rows] float32; 0 where none is."""
    if likely is None:
        likely = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    return _argmax(logits, out, likely), likely


def _argmax(logits: Tensor, out: Tensor | None, likely: Tensor | None) -> Tensor:
    largest, first, mass = row_parts(logits, likely is not None)
    rows, chunks = largest.shape
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        argmax_kernel[(rows,)](
            *(largest, first, mass, out, likely, chunks),
            WITH_MASS=likely is not None,
            PARTS=triton.next_power_of_2(chunks),
            num_warps=1,
        )
    return out


@triton.jit
def weight_sums_kernel(weights, row_stride, vocab, sums, chunks, CHUNK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * CHUNK + tl.arange(0, CHUNK)
    w = tl.load(weights + row.to(tl.int64) * row_stride + column, mask=column < vocab, other=0.0)
    tl.store(sums + row.to(tl.int64) * chunks + part, tl.sum(w.to(tl.float64), axis=0))


@triton.jit
def draw_kernel(weights, row_stride, vocab, sums, shares, out, chunks, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    amounts = tl.load(sums + row.to(tl.int64) * chunks + part, mask=part < chunks, other=0.0)
    upto = tl.cumsum(amounts, axis=0)
    wanted = tl.load(shares + row).to(tl.float64) * tl.max(upto, axis=0)
    found = tl.min(tl.where((upto > wanted) & (amounts > 0), part, PARTS), axis=0)
    # Rounding may leave the end open; then it is the last that can be drawn.
    chosen = tl.where(found < PARTS, found, tl.max(tl.where(amounts > 0, part, 0), axis=0))
    before = tl.sum(tl.where(part < chosen, amounts, 0.0), axis=0)
    column = chosen * CHUNK + tl.arange(0, CHUNK)
    w = tl.load(weights + row.to(tl.int64) * row_stride + column, mask=column < vocab, other=0.0).to(tl.float64)
    reached = before + tl.cumsum(w, axis=0) > wanted
    token = tl.min(tl.where(reached & (w > 0), column, vocab), axis=0)
    tl.store(out + row, tl.where(token < vocab, token, tl.max(tl.where(w > 0, column, 0), axis=0)))


def draw(weights: Tensor, shares: Tensor, out: Tensor | None = None) -> Tensor:
    """One token per row of weights [rows, vocab] float32: where the running sum exceeds the shares [rows] of it.

    Sums are of double precision, as the reference's are, in another order: a token may differ where a share ends within
    some 1e-15 of the border between two. 0 for a row without weight. ``out`` [rows] int64 (the default) or int32.
    """
    rows, vocab = weights.shape
    if weights.stride(1) != 1 or not vocab or shares.shape != (rows,):
        raise ValueError(f"shares of shape {tuple(shares.shape)} of weights of shape {tuple(weights.shape)}")
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=weights.device)
    if not rows:
        return out
    chunks = triton.cdiv(vocab, DRAW_CHUNK)
    sums = torch.empty(rows, chunks, dtype=torch.float64, device=weights.device)
    weight_sums_kernel[(rows, chunks)](weights, weights.stride(0), vocab, sums, chunks, CHUNK=DRAW_CHUNK, num_warps=4)
    draw_kernel[(rows,)](
        *(weights, weights.stride(0), vocab, sums, shares.contiguous(), out, chunks),
        CHUNK=DRAW_CHUNK,
        PARTS=triton.next_power_of_2(chunks),
        num_warps=8,
    )
    return out


@triton.jit
def uniform_kernel(keys, counters, out, count, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    key_low = tl.load(keys + 2 * at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    key_high = tl.load(keys + 2 * at + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
    low = tl.load(counters + 2 * at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(counters + 2 * at + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
    zero = tl.zeros_like(low)
    key = (key_high.to(tl.uint64) << 32) | key_low.to(tl.uint64)
    first, second, _, _ = tl.philox(key, low, high, zero + STREAM, zero)
    bits = ((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 11
    tl.store(out + at, bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16, mask=inside)


def uniform(keys: Tensor, counters: Tensor, stream: int = 0, out: Tensor | None = None) -> Tensor:
    """One number in [0, 1) per key and counter, bit for bit those of ``slipstream.kernels.random.uniform``.

    Args:
        keys, counters: [n, 2] int32, contiguous: the low and the high word of n 64-bit numbers.
        out: [n] float64.
    """
    if keys.shape != counters.shape or not (keys.is_contiguous() and counters.is_contiguous()):
        raise ValueError(f"keys of shape {tuple(keys.shape)} and counters of shape {tuple(counters.shape)}")
    if out is None:
        out = torch.empty(len(keys), dtype=torch.float64, device=keys.device)
    if len(keys):
        uniform_kernel[(triton.cdiv(len(keys), 128),)](
            keys, counters, out, len(keys), STREAM=stream, BLOCK=128, num_warps=4
        )
    return out
