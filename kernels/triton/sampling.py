"""Choosing tokens: the most likely one, or the first of an exponential race, whose noise is made on the device too.

Rows are cut into chunks of a fixed size, so that a few rows occupy a whole GPU, and what chunks give is combined in
order: the bits of a row depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from slipstream.kernels import random

CHUNK = 4096
"""Logits that one program looks at."""
RACE_CHUNK = 1024
"""Places whose noise and scores one program makes."""


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
    none = tl.where((top == float("-inf")) & (broken == 0), -2, -1)  # -2: NOTHING of the reference
    tl.store(out + row, tl.where(is_finite, found, none))
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

    -1 where it is not finite or the row holds no number somewhere, -2 where all are -infinity. ``out`` [rows] is int64
    or int32; by default int64.
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
def minus_log(share, rest):
    """-log(rest) of a number in (0, 1), where ``share`` is 1 - rest: to some units in the last place, however small."""
    z = share / (2.0 - share)
    square = z * z
    series = 1 / 9 + square * (1 / 11 + square / 13)
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return tl.where(share <= 0.5, 2.0 * z * series, -tl.log(rest))


@triton.jit
def least_noise(seed, low, high, block, LEAST: tl.constexpr):
    """The smallest noise of each block of 64 ids, and which of its ids has it; see ``slipstream.kernels.random``."""
    zero = block * 0
    first, second, third, _ = tl.philox(
        seed, (zero + low).to(tl.uint32), (zero + high).to(tl.uint32), (zero + LEAST).to(tl.uint32), block.to(tl.uint32)
    )
    bits = (((first.to(tl.uint64) << 32) | second.to(tl.uint64)) >> 12).to(tl.int64)
    share = (bits.to(tl.float32) + 0.5) * 2.220446049250313e-16
    rest = ((4503599627370495 - bits).to(tl.float32) + 0.5) * 2.220446049250313e-16
    return minus_log(share, rest) / 64, (third % 64).to(tl.int32)


@triton.jit
def noise_above(word):
    """What an id has above the smallest noise of its block."""
    bits = word.to(tl.int64)
    share = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((4294967295 - bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return minus_log(share, rest)


@triton.jit
def best_of_words(given, made, n, block, smallest, at, word, begin, ALL: tl.constexpr):
    """The best score of 16 ids of each block, from ``begin`` on, and the first place of it; ``word`` [blocks, 16]."""
    inside = begin + tl.arange(0, 16)[None, :]
    place = block[:, None] * 64 + inside
    noise = smallest[:, None] + tl.where(inside == at[:, None], 0.0, noise_above(word))
    w = tl.load(given + place, mask=place < n, other=0.0)
    score = tl.where(w > 0, w / noise, 0.0)
    if ALL:
        tl.store(made + place, score, mask=place < n)
    top = tl.max(tl.max(score, axis=1), axis=0)
    return top, tl.min(tl.min(tl.where(score == top, place, n), axis=1), axis=0)


@triton.jit
def better(top, where, other, other_where):
    """The larger of two scores and its place; of equal ones the first."""
    first = tl.where(other > top, other_where, tl.where(other == top, tl.minimum(where, other_where), where))
    return tl.maximum(top, other), first


@triton.jit
def race_kernel(
    weights,
    row_stride,
    n,
    seeds,
    indices,
    ids,
    scores,
    best,
    first,
    chunks,
    MAPPED: tl.constexpr,
    ALL: tl.constexpr,
    LEAST: tl.constexpr,
    ABOVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The best score of each chunk and the first place of it; with ``ALL``, the scores of all places."""
    row, part = tl.program_id(0), tl.program_id(1)
    given = weights + row.to(tl.int64) * row_stride
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    index = tl.load(indices + row).to(tl.uint64, bitcast=True)
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    made = scores + row.to(tl.int64) * n
    if MAPPED:
        place = part * CHUNK + tl.arange(0, CHUNK)
        token = tl.load(ids + place, mask=place < n, other=0)
        block, inside = token // 64, token % 64
        smallest, at = least_noise(seed, low, high, block, LEAST)
        zero = token * 0
        w0, w1, w2, w3 = tl.philox(
            seed,
            (zero + low).to(tl.uint32),
            (zero + high).to(tl.uint32),
            (zero + ABOVE).to(tl.uint32),
            (block * 16 + inside % 16).to(tl.uint32),
        )
        word = inside // 16
        chosen = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        noise = tl.where(inside == at, smallest, smallest + noise_above(chosen))
        w = tl.load(given + place, mask=place < n, other=0.0)
        score = tl.where(w > 0, w / noise, 0.0)
        if ALL:
            tl.store(made + place, score, mask=place < n)
        top = tl.max(score, axis=0)
        where = tl.min(tl.where(score == top, place, n), axis=0)
    else:
        # Each call of the generator gives the words of four ids.
        block = part * (CHUNK // 64) + tl.arange(0, CHUNK // 64)
        smallest, at = least_noise(seed, low, high, block, LEAST)
        call = block[:, None] * 16 + tl.arange(0, 16)[None, :]
        zero = call * 0
        w0, w1, w2, w3 = tl.philox(
            seed,
            (zero + low).to(tl.uint32),
            (zero + high).to(tl.uint32),
            (zero + ABOVE).to(tl.uint32),
            call.to(tl.uint32),
        )
        top, where = best_of_words(given, made, n, block, smallest, at, w0, 0, ALL)
        other, other_where = best_of_words(given, made, n, block, smallest, at, w1, 16, ALL)
        top, where = better(top, where, other, other_where)
        other, other_where = best_of_words(given, made, n, block, smallest, at, w2, 32, ALL)
        top, where = better(top, where, other, other_where)
        other, other_where = best_of_words(given, made, n, block, smallest, at, w3, 48, ALL)
        top, where = better(top, where, other, other_where)
    tl.store(best + row.to(tl.int64) * chunks + part, top)
    tl.store(first + row.to(tl.int64) * chunks + part, where)


@triton.jit
def first_of_race_kernel(best, first, out, score, chunks, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    at = row.to(tl.int64) * chunks + part
    tops = tl.load(best + at, mask=part < chunks, other=0.0)
    top = tl.max(tops, axis=0)
    places = tl.load(first + at, mask=part < chunks, other=0)
    found = tl.min(tl.where((tops == top) & (part < chunks), places, 2147483647), axis=0)
    tl.store(out + row, tl.where(top > 0, found, -1).to(tl.int64))
    tl.store(score + row, top)


def race(
    weights: Tensor, seeds: Tensor, indices: Tensor, count: int = 1, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What ``ops.race`` says. Noise is made where its weight is, of all tokens, in single precision."""
    rows, n = weights.shape
    if weights.stride(1) != 1 or not n or not (seeds.shape == indices.shape == (rows,)):
        raise ValueError(f"seeds of shape {tuple(seeds.shape)} for weights of shape {tuple(weights.shape)}")
    device = weights.device
    if not rows:
        return torch.empty(0, count, dtype=torch.int64, device=device), torch.empty(0, count, device=device)
    chunks = triton.cdiv(n, RACE_CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    first = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    every = torch.empty(rows, n, dtype=torch.float32, device=device) if count > 1 else best
    race_kernel[(rows, chunks)](
        *(weights, weights.stride(0), n, seeds.contiguous(), indices.contiguous()),
        *(seeds if ids is None else ids.int().contiguous(), every, best, first, chunks),
        MAPPED=ids is not None,
        ALL=count > 1,
        LEAST=random.LEAST,
        ABOVE=random.ABOVE,
        CHUNK=RACE_CHUNK,
        num_warps=4,
    )
    if count > 1:
        scores, places = every.topk(min(count, n))
        places = places.masked_fill(scores <= 0, -1)
        missing = count - places.shape[1]
        return functional.pad(places, (0, missing), value=-1), functional.pad(scores, (0, missing))
    out = torch.empty(rows, 1, dtype=torch.int64, device=device)
    score = torch.empty(rows, 1, dtype=torch.float32, device=device)
    first_of_race_kernel[(rows,)](best, first, out, score, chunks, PARTS=triton.next_power_of_2(chunks), num_warps=1)
    return out, score
