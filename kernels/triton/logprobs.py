"""Log-probabilities to report: of a token with its rank, and of the most likely ones, in one reading of logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.distribution import float_at, order_of
from slipstream.kernels.triton.sampling import CHUNK, joined_mass

COUNTS = (0, 8, 32)
"""How many of the most likely tokens kernels are compiled for, since each number takes a second when it first comes: of
more than were asked for, some are left out."""
MOST = COUNTS[-1]
"""The most likely tokens that can be asked for."""
NOTHING = tl.constexpr(-9223372036854775808)


@triton.jit
def logprob_parts_kernel(
    logits,
    row_stride,
    vocab,
    tokens,
    largest,
    mass,
    larger,
    best,
    chunks,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    given = logits + row.to(tl.int64) * row_stride
    column = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(given + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    broken = tl.max((x != x).to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    at = row.to(tl.int64) * chunks + part
    tl.store(largest + at, tl.where(broken, float("nan"), top))
    is_finite = (top > float("-inf")) & (top < float("inf"))
    tl.store(mass + at, tl.sum(tl.exp(x - tl.where(is_finite, top, 0.0)), axis=0))
    token = tl.load(tokens + row).to(tl.int64)
    chosen = tl.load(given + token, mask=(token >= 0) & (token < vocab), other=float("inf")).to(tl.float32)
    tl.store(larger + at, tl.sum((x > chosen).to(tl.int32), axis=0))
    if COUNT:
        keys = (order_of(x).to(tl.int64) << 32) | (2147483647 - column).to(tl.int64)
        keys = tl.where(column < vocab, keys, NOTHING)
        for place in range(COUNT):
            key = tl.max(keys, axis=0)
            tl.store(best + at * COUNT + place, key)
            keys = tl.where(keys == key, NOTHING, keys)


@triton.jit
def logprobs_kernel(
    logits,
    row_stride,
    vocab,
    tokens,
    largest,
    mass,
    larger,
    best,
    logprobs,
    ranks,
    top_tokens,
    top_logprobs,
    chunks,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0)
    top, is_finite, total = joined_mass(largest, mass, row, chunks, PARTS)
    log_total = tl.where(is_finite, tl.log(total), float("nan"))
    token = tl.load(tokens + row).to(tl.int64)
    is_token = (token >= 0) & (token < vocab)
    chosen = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=is_token, other=float("-inf")).to(tl.float32)
    tl.store(logprobs + row, chosen - tl.where(is_finite, top, 0.0) - log_total)
    part = tl.arange(0, PARTS)
    above = tl.load(larger + row.to(tl.int64) * chunks + part, mask=part < chunks, other=0)
    tl.store(ranks + row, tl.where(is_token, tl.sum(above, axis=0) + 1, 0))
    if COUNT:
        slot = tl.arange(0, SLOTS)
        at = row.to(tl.int64) * chunks * COUNT
        keys = tl.load(best + at + slot, mask=slot < chunks * COUNT, other=NOTHING)
        for place in range(COUNT):
            key = tl.max(keys, axis=0)
            keys = tl.where(keys == key, NOTHING, keys)
            value = float_at(key >> 32) - tl.where(is_finite, top, 0.0) - log_total
            column = 2147483647 - (key & 0xFFFFFFFF)
            out = row.to(tl.int64) * COUNT + place
            tl.store(top_tokens + out, tl.where(key == NOTHING, -1, column).to(tl.int32))
            tl.store(top_logprobs + out, tl.where(key == NOTHING, float("-inf"), value))


def log_probabilities(logits: Tensor, tokens: Tensor, count: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of a token per row, and of the ``count`` most likely ones, at temperature 1.

    Args:
        logits: [rows, vocab], float32, bfloat16 or float16, with contiguous rows.
        tokens: [rows] int32 or int64; -1 for none, whose log-probability is then minus infinity and its rank 0.
        count: at most 32.
    Returns:
        The log-probability of the token [rows] float32; its rank [rows] int32, which is one more than the number of
        larger logits; the most likely tokens, best first, the first of equals before others [rows, count] int32 (-1
        where there are no more); and their log-probabilities [rows, count] float32. All log-probabilities of a row are
        NaN where its largest logit is not finite or one is no number.
    """
    rows, vocab = logits.shape
    if logits.stride(1) != 1 or not vocab or tokens.shape != (rows,) or not 0 <= count <= MOST:
        raise ValueError(f"{count} log-probabilities for tokens {tuple(tokens.shape)}, logits {tuple(logits.shape)}")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    asked, count = count, next(most for most in COUNTS if count <= most)
    chunks = triton.cdiv(vocab, CHUNK)
    largest, mass, larger = empty(rows, chunks), empty(rows, chunks), empty(rows, chunks, dtype=torch.int32)
    best = empty(rows, chunks, count, dtype=torch.int64)
    logprobs, ranks = empty(rows), empty(rows, dtype=torch.int32)
    top_tokens, top_logprobs = empty(rows, count, dtype=torch.int32), empty(rows, count)
    if rows:
        logprob_parts_kernel[(rows, chunks)](
            *(logits, logits.stride(0), vocab, tokens, largest, mass, larger, best, chunks),
            COUNT=count,
            CHUNK=CHUNK,
            num_warps=8,
        )
        logprobs_kernel[(rows,)](
            *(logits, logits.stride(0), vocab, tokens, largest, mass, larger, best),
            *(logprobs, ranks, top_tokens, top_logprobs, chunks),
            COUNT=count,
            PARTS=triton.next_power_of_2(chunks),
            SLOTS=triton.next_power_of_2(chunks * max(count, 1)),
            num_warps=4,
        )
    return logprobs, ranks, top_tokens[:, :asked], top_logprobs[:, :asked]
