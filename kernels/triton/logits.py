"""Changes to logits before sampling: penalties, biases, bans and lists of what is allowed; many rows in one launch.

What is to be changed comes as lists that lie one behind the other: those of row r are ``start[r] : start[r + 1]``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 8
"""Programs that share the list of a row."""


@triton.jit
def penalize_kernel(
    logits,
    row_stride,
    start,
    tokens,
    counts,
    repetition,
    frequency,
    presence,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    end = tl.load(start + row + 1)
    first = tl.load(start + row) + tl.program_id(1) * BLOCK
    divisor, per_token, once = tl.load(repetition + row), tl.load(frequency + row), tl.load(presence + row)
    for at in range(first, end, tl.num_programs(1) * BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(tokens + place, mask=place < end, other=0).to(tl.int64)
        where = logits + row.to(tl.int64) * row_stride + token
        x = tl.load(where, mask=place < end, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, divisor), x * divisor)
        if HAS_COUNTS:
            count = tl.load(counts + place, mask=place < end, other=0).to(tl.float32)
            x = tl.where(count > 0, x - (per_token * count + once), x)
        tl.store(where, x, mask=place < end)


def penalize_rows(
    logits: Tensor,
    start: Tensor,
    tokens: Tensor,
    counts: Tensor | None,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Applies penalties to rows of logits [rows, vocab] float32 in place, as ``ops.penalize`` does to one.

    Args:
        start: [rows + 1] int32: where the list of each row begins, and where the last one ends.
        tokens: distinct tokens of prompt and output, int32 or int64, of all rows, in any order.
        counts: how often each occurs in the output, int32 or float32; 0 for those of the prompt only. None for 0.
        repetition, frequency, presence: [rows] float32; 1, 0 and 0 for none.
    """
    rows = _check(logits, start)
    if rows:
        penalize_kernel[(rows, PROGRAMS)](
            *(logits, logits.stride(0), start, tokens, counts, repetition, frequency, presence),
            HAS_COUNTS=counts is not None,
            BLOCK=256,
            num_warps=4,
            enable_fp_fusion=False,  # so that it rounds as the reference does
        )


@triton.jit
def add_to_logits_kernel(logits, row_stride, start, tokens, values, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    end = tl.load(start + row + 1)
    first = tl.load(start + row) + tl.program_id(1) * BLOCK
    for at in range(first, end, tl.num_programs(1) * BLOCK):
        place = at + tl.arange(0, BLOCK)
        token = tl.load(tokens + place, mask=place < end, other=0).to(tl.int64)
        where = logits + row.to(tl.int64) * row_stride + token
        added = tl.load(values + place, mask=place < end, other=0.0)
        x = tl.load(where, mask=place < end, other=0.0) + added
        tl.store(where, tl.where(added == float("-inf"), float("-inf"), x), mask=place < end)


def add_to_logits(logits: Tensor, start: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Adds biases to logits [rows, vocab] float32 in place; minus infinity bans a token.

    Args:
        start: [rows + 1] int32: where the list of each row begins, and where the last one ends.
        tokens: distinct tokens of each list, int32 or int64.
        values: what is added to each, float32.
    """
    rows = _check(logits, start)
    if rows:
        add_to_logits_kernel[(rows, PROGRAMS)](logits, logits.stride(0), start, tokens, values, BLOCK=256, num_warps=4)


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
