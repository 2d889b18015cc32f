"""A mixture of experts: each token goes through a few of many gated networks (Shazeer et al. 2017; Qwen3's, 2025).

Pairs of a token and one of its experts are put in order of the expert, in tiles that have one expert each. As a tile
is not full where an expert's pairs end, there is room for one more tile per expert; only the device knows how many are
used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.activation import silu


@triton.jit
def route_kernel(
    logits,
    row_stride,
    experts,
    shares,
    num_experts,
    TOP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert, slot = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    x = tl.load(logits + row * row_stride + expert, mask=expert < num_experts, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x, axis=0))
    total = tl.sum(weights, axis=0)
    left = tl.where(expert < num_experts, weights, -1.0)
    chosen, kept = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.float32)
    for place in range(TOP):
        best = tl.max(left, axis=0)
        found = tl.minimum(tl.min(tl.where(left == best, expert, BLOCK), axis=0), num_experts - 1)
        chosen, kept = tl.where(slot == place, found, chosen), tl.where(slot == place, best, kept)
        left = tl.where(expert == found, -1.0, left)
    if RENORMALIZE:
        total = tl.sum(kept, axis=0)
    tl.store(experts + row * TOP + slot, chosen, mask=slot < TOP)
    tl.store(shares + row * TOP + slot, kept / total, mask=slot < TOP)


@triton.jit(do_not_specialize=["pairs"])
def count_pairs_kernel(experts, counts, pairs, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count += (tl.load(experts + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["pairs", "tiles"])
def place_pairs_kernel(
    experts,
    counts,
    order,
    tile_experts,
    pairs,
    num_experts,
    tiles,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The pairs of an expert, in order, from the tile on at which those of the experts before it end.

    One program more than there are experts says of the other tiles that they are not used.
    """
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    count = tl.load(counts + other, mask=other < num_experts, other=0)
    before = tl.sum(tl.where(other < expert, (count + TILE - 1) // TILE, 0), axis=0)
    if expert == num_experts:
        for tile in range(before, tiles):
            tl.store(tile_experts + tile, -1)
    else:
        found = 0
        for start in range(0, pairs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mine = tl.load(experts + at, mask=at < pairs, other=-1) == expert
            place = before * TILE + found + tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(order + place, at, mask=mine)
            found += tl.sum(mine.to(tl.int32), axis=0)
        used = (found + TILE - 1) // TILE
        lane = tl.arange(0, TILE)
        for tile in range(before, before + used):
            tl.store(tile_experts + tile, expert)
            slot = (tile - before) * TILE + lane
            tl.store(order + before * TILE + slot, -1 + tl.zeros([TILE], tl.int32), mask=slot >= found)


@triton.jit
def gate_up_kernel(
    x,
    x_stride,
    weight,
    order,
    tile_experts,
    out,
    inner,
    k,
    TOP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(x gate^T) * (x up^T) of the pairs of a tile, whose rows of x are those of their tokens."""
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        pair = tl.load(order + tile * TILE + tl.arange(0, TILE))
        is_pair = (pair >= 0)[:, None]
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at_k = tl.arange(0, BLOCK_K)
        rows = x + (pair // TOP).to(tl.int64)[:, None] * x_stride
        gate_rows = weight + (expert.to(tl.int64) * 2 * inner + column)[None, :] * k
        up_rows = weight + ((expert.to(tl.int64) * 2 + 1) * inner + column)[None, :] * k
        gate = tl.zeros([TILE, BLOCK_N], tl.float32)
        up = tl.zeros([TILE, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            at = start + at_k
            a = tl.load(rows + at[None, :], mask=is_pair & (at < k)[None, :], other=0.0)
            mask = (column < inner)[None, :] & (at < k)[:, None]
            gate = tl.dot(a, tl.load(gate_rows + at[:, None], mask=mask, other=0.0), gate, input_precision="ieee")
            up = tl.dot(a, tl.load(up_rows + at[:, None], mask=mask, other=0.0), up, input_precision="ieee")
        dtype = out.dtype.element_ty
        activated = silu(gate.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        product = activated * up.to(dtype).to(tl.float32)
        where = pair.to(tl.int64)[:, None] * inner + column[None, :]
        tl.store(out + where, product.to(dtype), mask=is_pair & (column < inner)[None, :])


@triton.jit
def down_kernel(
    x,
    weight,
    order,
    tile_experts,
    out,
    n,
    k,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The product of each pair's row of x with the transpose of its expert's matrix."""
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        pair = tl.load(order + tile * TILE + tl.arange(0, TILE))
        is_pair = (pair >= 0)[:, None]
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        at_k = tl.arange(0, BLOCK_K)
        rows = x + pair.to(tl.int64)[:, None] * k
        weight_rows = weight + (expert.to(tl.int64) * n + column)[None, :] * k
        sums = tl.zeros([TILE, BLOCK_N], tl.float32)
        for start in range(0, k, BLOCK_K):
            at = start + at_k
            a = tl.load(rows + at[None, :], mask=is_pair & (at < k)[None, :], other=0.0)
            mask = (column < n)[None, :] & (at < k)[:, None]
            b = tl.load(weight_rows + at[:, None], mask=mask, other=0.0)
            sums = tl.dot(a, b, sums, input_precision="ieee")
        where = pair.to(tl.int64)[:, None] * n + column[None, :]
        tl.store(out + where, sums.to(out.dtype.element_ty), mask=is_pair & (column < n)[None, :])


@triton.jit
def join_kernel(parts, experts, shares, out, out_stride, width, TOP: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype = parts.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(TOP):
        pair = token * TOP + place
        share = tl.load(shares + pair).to(dtype).to(tl.float32)
        there = (column < width) & (tl.load(experts + pair) >= 0)
        part = tl.load(parts + pair * width + column, mask=there, other=0.0).to(tl.float32)
        total += tl.where(there, (part * share).to(dtype).to(tl.float32), 0.0)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=column < width)


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts tokens go to."""

    experts: Tensor  # [tokens, top] int32, the most likely first; -1 for none
    shares: Tensor  # [tokens, top] float32


@dataclass(frozen=True, slots=True)
class Order:
    """Pairs of a token and an expert in tiles of one expert each. Pair p is of token p // top."""

    pairs: Tensor  # [tiles * tile] int32; -1 for none
    tile_experts: Tensor  # [tiles] int32; -1 for a tile that is not used, whose pairs are not set
    tile: int


def route(logits: Tensor, top: int, renormalize: bool) -> Routes:
    """The ``top`` most likely experts of each token by logits [tokens, experts]; of equals the first.

    Shares are probabilities, which add up to 1 if they are renormalized.
    """
    tokens, count = logits.shape
    if logits.stride(1) != 1 or not 0 < top <= count:
        raise ValueError(f"{top} of {count} experts, or logits without contiguous rows")
    experts = torch.empty(tokens, top, dtype=torch.int32, device=logits.device)
    shares = torch.empty(tokens, top, dtype=torch.float32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            *(logits, logits.stride(0), experts, shares, count),
            TOP=top,
            RENORMALIZE=renormalize,
            BLOCK=triton.next_power_of_2(count),
            SLOTS=triton.next_power_of_2(top),
            num_warps=1,
        )
    return Routes(experts, shares)


def order_by_expert(experts: Tensor, num_experts: int, tile: int) -> Order:
    """Puts the pairs of experts [tokens, top] int32 in order; those of expert -1 are left out."""
    count, device = experts.numel(), experts.device
    tiles = triton.cdiv(count, tile) + num_experts
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    order = Order(
        torch.empty(tiles * tile, dtype=torch.int32, device=device),
        torch.empty(tiles, dtype=torch.int32, device=device),
        tile,
    )
    count_pairs_kernel[(num_experts,)](experts, counts, count, BLOCK=1024, num_warps=4)
    place_pairs_kernel[(num_experts + 1,)](
        *(experts, counts, order.pairs, order.tile_experts, count, num_experts, tiles),
        TILE=tile,
        BLOCK=1024,
        EXPERTS=triton.next_power_of_2(num_experts),
        num_warps=4,
    )
    return order


def experts_mlp(x: Tensor, routes: Routes, gate_up: Tensor, down: Tensor, tile_rows: int = 0) -> Tensor:
    """The shares' weighted sum of what each token's experts make of it: [tokens, hidden], in the format of x.

    Expert e computes (silu(x gate^T) * (x up^T)) down^T, rounded after each operation to the format of x, as is each
    product with a share; these are added in float32 in the order of the routes. Tokens without experts get zeros.

    Args:
        x: [tokens, hidden], float32, bfloat16 or float16, with contiguous rows.
        gate_up: [experts, 2 * inner, hidden], contiguous: gate, then up.
        down: [experts, hidden, inner], contiguous.
        tile_rows: rows of a tile, 16, 32 or 64; 0 to choose by the number of pairs per expert. With one of them a row's
            bits do not depend on the others; between them they may differ on Hopper.
    """
    tokens, hidden = x.shape
    top = routes.experts.shape[1]
    num_experts, twice, _ = gate_up.shape
    inner = twice // 2
    if (
        gate_up.shape != (num_experts, 2 * inner, hidden)
        or down.shape != (num_experts, hidden, inner)
        or not (gate_up.is_contiguous() and down.is_contiguous() and routes.experts.is_contiguous())
        or x.stride(1) != 1
        or tile_rows not in (0, 16, 32, 64)
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, gate and up {tuple(gate_up.shape)}, down {tuple(down.shape)}, {tile_rows=}"
        )
    out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    exact = x.dtype is torch.float32
    tile = tile_rows or (16 if tokens * top <= 16 * num_experts or exact else 64)
    block_n, block_k = (32, 32) if exact else (64, 64)
    order = order_by_expert(routes.experts, num_experts, tile)
    tiles = len(order.tile_experts)
    middle = torch.empty(tokens * top, inner, dtype=x.dtype, device=x.device)
    gate_up_kernel[(tiles, triton.cdiv(inner, block_n))](
        *(x, x.stride(0), gate_up, order.pairs, order.tile_experts, middle, inner, hidden),
        TOP=top,
        TILE=tile,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    parts = torch.empty(tokens * top, hidden, dtype=x.dtype, device=x.device)
    down_kernel[(tiles, triton.cdiv(hidden, block_n))](
        *(middle, down, order.pairs, order.tile_experts, parts, hidden, inner),
        TILE=tile,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    block = min(triton.next_power_of_2(hidden), 1024)
    join_kernel[(tokens, triton.cdiv(hidden, block))](
        parts, routes.experts, routes.shares, out, out.stride(0), hidden, TOP=top, BLOCK=block, num_warps=4
    )
    return out
