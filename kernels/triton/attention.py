"""Paged attention over a ragged batch: decode, chunks of prompts, verification and branches are all segments of it.

A program has a tile: some tokens of one segment with all query heads that share a KV head, as rows of one matrix. It
visits keys in chunks counted from the start of the sequence with an online softmax (Milakov & Gimelshein 2018), so that
the bits of a row depend on its position only: not on the batch, not on how the sequence was cut into steps, and not on
what there is room for. There are two kinds of tiles, since what suits one token is slow for hundreds:

* tiles of rows: few tokens. Keys go in splits of a fixed number, which run beside each other and are then combined in
  their order (Dao et al. 2023, "Flash-Decoding"), or, where that would take too much memory, one after the other.
* tiles of prompts: more tokens, for segments longer than ``LONGEST_ROWS``; all keys in one go.

Each kind has its own order of adding up, and on Hopper and Blackwell its own instructions; so the bits of one are not
those of the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton import launch
from slipstream.kernels.triton.device_batch import DeviceBatch
from slipstream.kernels.triton.online import LOG2_E, finish, join, store_part, visit_keys
from slipstream.kernels.triton.tiles import Tiles, prompt_tiles, row_tiles

LONGEST_ROWS = 32
"""Longer segments are prompts, if the caller says that there are any: no verification of draft tokens is as long."""
PARTS_BYTES = 256 << 20
"""What the results of splits may take; where they would take more, splits go one after the other, to the same bits."""
ENOUGH_PROGRAMS = 8192
"""Programs that occupy the largest GPU many times over. With more splits than that needs, a program computes several:
a graph is recorded for more splits than most sequences have, and a program that finds nothing to do costs about as much
as a small split."""
FEWEST_SEGMENTS = 256
"""Segments that kernels look for at least: looking through as many costs nothing, and each power of two is compiled."""
ANY_LENGTH = 1 << 30
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["num_segments", "window", "splits", "shortest", "longest"])
def attend_tile(
    q,
    keys,
    values,
    out,
    parts,
    part_stats,
    q_start,
    kv_len,
    table_row,
    block_tables,
    key_scales,
    value_scales,
    sinks,
    num_segments,
    q_stride,
    table_stride,
    scale,
    softcap,
    window,
    splits,
    shortest,
    longest,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    APART: tl.constexpr,
    SEVERAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """One tile of one KV head, over all keys or, where splits are APART, over one of them, or SEVERAL one by one."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    WIDTH: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    # The longest ones first; on one axis, as the others end at 65535.
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.num_programs(0) // KV_HEADS - 1 - tl.program_id(0) // KV_HEADS
    # Segment s has the tiles from q_start[s] // TOKENS + s on, which leaves at least as many as it needs.
    s = tl.arange(0, SEGMENTS)
    first_tile = tl.load(q_start + s, mask=s < num_segments, other=1 << 30) // TOKENS + s
    segment = tl.sum((first_tile <= tile).to(tl.int32)) - 1
    begin = tl.load(q_start + segment)
    count = tl.load(q_start + segment + 1) - begin
    start = tl.load(kv_len + segment) - count  # before it is known whether it is needed: loads beside each other
    first = (tile - (begin // TOKENS + segment)) * TOKENS
    if (first >= count) | (count < shortest) | (count > longest):
        return
    last = start + tl.minimum(first + TOKENS, count)  # keys before it are visible to some row
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(start + first - window + 1, 0) // CHUNK * CHUNK
    split = tl.program_id(1)
    if APART:
        split += low // SPLIT
        if split * SPLIT >= last:
            return
    row = tl.arange(0, ROWS)
    # Rows that are left over compute what the last token's do, and are not stored.
    live = (first + row // GROUP < count) & (row < TOKENS * GROUP)
    token = tl.minimum(first + tl.minimum(row // GROUP, TOKENS - 1), count - 1)
    head = kv_head * GROUP + row % GROUP
    position = start + token
    token = (begin + token).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = (d < HEAD_DIM)[None, :]
    queries = tl.load(q + (token * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)
    queries = queries.to(OPERAND)
    table = block_tables + tl.load(table_row + segment).to(tl.int64) * table_stride
    at = token * HEADS + head
    stored = live[:, None] & inside
    if APART and SEVERAL:
        for each in tl.range(split, tl.cdiv(last, SPLIT), tl.num_programs(1)):
            best, total, acc = visit_keys(
                queries, position, tl.maximum(low, each * SPLIT), tl.minimum(last, each * SPLIT + SPLIT),
                keys, values, key_scales, value_scales, table, kv_head, scale, softcap, window,
                BLOCK_SIZE, KV_HEADS, HEAD_DIM, OPERAND, CHUNK, HAS_WINDOW, HAS_SOFTCAP, HAS_SCALES,
            )  # fmt: skip
            store_part(parts, part_stats, at * splits + each, best, total, acc, live, stored, HEAD_DIM)
    elif APART:  # a loop takes registers, and with them the room of another program
        best, total, acc = visit_keys(
            queries, position, tl.maximum(low, split * SPLIT), tl.minimum(last, split * SPLIT + SPLIT),
            keys, values, key_scales, value_scales, table, kv_head, scale, softcap, window,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, OPERAND, CHUNK, HAS_WINDOW, HAS_SOFTCAP, HAS_SCALES,
        )  # fmt: skip
        store_part(parts, part_stats, at * splits + split, best, total, acc, live, stored, HEAD_DIM)
    else:
        if SPLIT == 0:
            best, total, acc = visit_keys(
                queries, position, low, last,
                keys, values, key_scales, value_scales, table, kv_head, scale, softcap, window,
                BLOCK_SIZE, KV_HEADS, HEAD_DIM, OPERAND, CHUNK, HAS_WINDOW, HAS_SOFTCAP, HAS_SCALES,
            )  # fmt: skip
        else:
            best = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, WIDTH], tl.float32)
            for border in tl.range(low // SPLIT * SPLIT, last, SPLIT):
                best_next, total_next, acc_next = visit_keys(
                    queries, position, tl.maximum(low, border), tl.minimum(last, border + SPLIT),
                    keys, values, key_scales, value_scales, table, kv_head, scale, softcap, window,
                    BLOCK_SIZE, KV_HEADS, HEAD_DIM, OPERAND, CHUNK, HAS_WINDOW, HAS_SOFTCAP, HAS_SCALES,
                )  # fmt: skip
                best, total, acc = join(best, total, acc, best_next, total_next, acc_next)
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        acc = finish(best, total, acc, sink, HAS_SINKS)
        tl.store(out + (at * HEAD_DIM)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_segments", "window", "splits", "longest"])
def combine_splits(
    parts,
    part_stats,
    out,
    q_start,
    kv_len,
    sinks,
    num_segments,
    window,
    splits,
    longest,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """The splits that one token sees, one after the other, for the query heads of one KV head."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    WIDTH: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    token, kv_head = tl.program_id(0), tl.program_id(1)
    s = tl.arange(0, SEGMENTS)
    ends = tl.load(q_start + 1 + s, mask=s < num_segments, other=1 << 30)
    segment = tl.sum((ends <= token).to(tl.int32))
    if segment >= num_segments:
        return
    begin, end = tl.load(q_start + segment), tl.load(q_start + segment + 1)
    if end - begin > longest:
        return
    position = tl.load(kv_len + segment) - (end - token)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position - window + 1, 0) // SPLIT
    row, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = kv_head * GROUP + tl.minimum(row, GROUP - 1)
    at = token.to(tl.int64) * HEADS + head
    inside = (d < HEAD_DIM)[None, :]
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for split in tl.range(first, position // SPLIT + 1, loop_unroll_factor=4):  # whose loads wait beside each other
        slot = at * splits + split
        part = tl.load(parts + (slot * HEAD_DIM)[:, None] + d[None, :], mask=inside, other=0.0)
        best_next, total_next = tl.load(part_stats + slot * 2), tl.load(part_stats + slot * 2 + 1)
        best, total, acc = join(best, total, acc, best_next, total_next, part)
    sink = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    acc = finish(best, total, acc, sink, HAS_SINKS)
    stored = (row < GROUP)[:, None] & inside
    tl.store(out + (at * HEAD_DIM)[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=stored)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: DeviceBatch,
    scale: float,
    *,
    max_context: int,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    prompt: bool = False,
    row_tokens: int | None = None,
    rows: Tiles | None = None,
) -> Tensor:
    """Causal attention of every token of the batch over its sequence in the cache.

    Args:
        q: [tokens, heads, head_dim] float32, bfloat16 or float16; tokens may be any distance apart.
        keys, values: [cells, kv_heads, head_dim] of one layer, contiguous, in those formats, int8 or float8_e4m3fn.
        scale, window, softcap, sinks: as in ``reference.attention``.
        max_context: no sequence is longer, or none of those that are computed as rows.
        scales: [cells * kv_heads] bfloat16 each, what keys and what values were divided by; None for 1.
        prompt: whether segments of more than ``LONGEST_ROWS`` tokens are computed as prompts. Without it all bits are
            those of rows.
        row_tokens: where prompts are, segments of at most ``LONGEST_ROWS`` tokens lie within so many first tokens of
            the batch; 0 if there are none. All tokens by default.
        rows: tiles of rows, for tests; by default what ``row_tiles`` says.
    Returns:
        [tokens, heads, head_dim] in the dtype of q, contiguous; where there is no token, anything.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    if q.stride(2) != 1 or (heads > 1 and q.stride(1) != head_dim):
        raise ValueError(f"the heads of a token of q must lie beside each other; its strides are {q.stride()}")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    stored = q.dtype if keys.dtype.itemsize == 1 else keys.dtype
    operand = q.dtype if stored is q.dtype else torch.float32
    group = heads // kv_heads
    rows = rows or row_tiles(head_dim, group, operand, small=not launch.capability(q.device))
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    shared = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "SEGMENTS": max(FEWEST_SEGMENTS, triton.next_power_of_2(batch.num_segments)),
        "HAS_WINDOW": window > 0,
        "HAS_SINKS": sinks is not None,
    }
    key_scales, value_scales = scales or (None, None)

    def attend(
        tiles: Tiles, covered: int, lengths: tuple[int, int], parts: Tensor | None, stats: Tensor | None, splits: int
    ) -> None:
        programs = kv_heads * (covered // (tiles.rows // group) + batch.num_segments)
        beside = min(splits, triton.cdiv(ENOUGH_PROGRAMS, programs))
        attend_tile[programs, beside](
            *(q, keys, values, out, parts, stats),
            *(batch.q_start, batch.kv_len, batch.table_row, batch.block_tables),
            *(key_scales, value_scales, sinks),
            *(batch.num_segments, q.stride(0), batch.block_tables.stride(0), scale, softcap, window, splits, *lengths),
            **shared,
            BLOCK_SIZE=batch.block_size,
            OPERAND=TYPES[operand],
            ROWS=tiles.rows,
            CHUNK=tiles.chunk,
            SPLIT=tiles.split,
            APART=parts is not None,
            SEVERAL=beside < splits,
            HAS_SOFTCAP=softcap > 0,
            HAS_SCALES=scales is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    longest = ANY_LENGTH
    if prompt:
        longest = LONGEST_ROWS
        attend(prompt_tiles(head_dim, group, operand), tokens, (longest + 1, ANY_LENGTH), None, None, 1)
    covered = row_tokens if prompt and row_tokens is not None else tokens
    splits = triton.cdiv(max_context, rows.split)
    if covered and splits == 1:
        attend(replace(rows, split=0), covered, (1, longest), None, None, 1)
    elif covered * heads * splits * head_dim * 4 > PARTS_BYTES:
        attend(rows, covered, (1, longest), None, None, 1)
    elif covered:
        parts = torch.empty(covered, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(covered, heads, splits, 2, dtype=torch.float32, device=q.device)
        attend(rows, covered, (1, longest), parts, stats, splits)
        elements = triton.next_power_of_2(group) * triton.next_power_of_2(head_dim)
        combine_splits[covered, kv_heads](
            *(parts, stats, out, batch.q_start, batch.kv_len, sinks),
            *(batch.num_segments, window, splits, longest),
            **shared,
            SPLIT=rows.split,
            num_warps=min(8, max(1, elements // 128)),
        )
    return out
