"""Changes to logits before sampling: penalties, biases, bans and lists of what is allowed; many rows in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Entries that one program changes."""


@triton.jit(do_not_specialize=["entries"])
def change_kernel(
    logits,
    row_stride,
    vocab,
    rows,
    place,
    tokens,
    added,
    counts,
    repetition,
    frequency,
    presence,
    entries,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + at, mask=at < entries, other=-1)
    there = (token >= 0) & (token < vocab)
    mine = tl.load(place + at, mask=there, other=0)
    row = tl.load(rows + mine, mask=there, other=0).to(tl.int64)
    where = logits + row * row_stride + token
    x = tl.load(where, mask=there, other=0.0)
    more = tl.load(added + at, mask=there, other=0.0)
    x = tl.where(more == float("-inf"), more, tl.where(more == 0, x, x + more))
    count = tl.load(counts + at, mask=there, other=-1)
    by = tl.load(repetition + mine, mask=there, other=1.0)
    x = tl.where(count >= 0, tl.where(x > 0, tl.div_rn(x, by), x * by), x)
    each, once = tl.load(frequency + mine, mask=there, other=0.0), tl.load(presence + mine, mask=there, other=0.0)
    x = tl.where(count > 0, x - (each * count.to(tl.float32) + once), x)
    tl.store(where, x, mask=there)


def change_logits(
    logits: Tensor,
    rows: Tensor,
    place: Tensor,
    tokens: Tensor,
    added: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """As ``ops.change_logits``, in one launch; tokens that there are none of are left out."""
    if logits.stride(1) != 1 or not len(tokens) == len(place) == len(added) == len(counts):
        raise ValueError(f"{len(tokens)} tokens, {len(place)} places, logits of shape {tuple(logits.shape)}")
    if len(tokens):
        change_kernel[(triton.cdiv(len(tokens), BLOCK),)](
            *(logits, logits.stride(0), logits.shape[1], rows, place, tokens, added, counts),
            *(repetition, frequency, presence, len(tokens)),
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # so that it rounds as the reference does
        )


@triton.jit
def allow_only_kernel(logits, row_stride, vocab, start, tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    first, end = tl.load(start + row), tl.load(start + row + 1)
    if first < end:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        # Of the ascending list, find the first that is not smaller than the column.
        low = tl.zeros([BLOCK], tl.int32) + first
        high = tl.zeros([BLOCK], tl.int32) + end
        left = end - first
        while left > 0:
            middle = (low + high) // 2
            smaller = tl.load(tokens + middle, mask=low < high, other=0) < column
            high = tl.where((low < high) & (smaller == 0), middle, high)
            low = tl.where((low < high) & smaller, middle + 1, low)
            left = left // 2
        found = tl.load(tokens + low, mask=low < end, other=-1)
        banned = (found != column) & (column < vocab)
        never = tl.full([BLOCK], float("-inf"), tl.float32)
        tl.store(logits + row.to(tl.int64) * row_stride + column, never, mask=banned)


def allow_only(logits: Tensor, start: Tensor, tokens: Tensor) -> None:
    """Bans all other tokens than those of a row's list in logits [rows, vocab] float32, in place; an empty list none.

    Args:
        start: [rows + 1] int32: where the list of each row begins, and where the last one ends.
        tokens: ascending tokens of each list, int32.
    """
    rows = _check(logits, start)
    if rows:
        vocab = logits.shape[1]
        allow_only_kernel[(rows, triton.cdiv(vocab, 1024))](
            logits, logits.stride(0), vocab, start, tokens, BLOCK=1024, num_warps=4
        )


def _check(logits: Tensor, start: Tensor) -> int:
    rows = len(logits)
    if logits.stride(1) != 1 or start.shape != (rows + 1,) or not start.is_contiguous():
        raise ValueError(f"starts of shape {tuple(start.shape)} for logits of shape {tuple(logits.shape)}")
    return rows
