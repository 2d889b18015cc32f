"""How large the pieces are that attention is computed in, which its bits depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one kind of tile is computed; bits depend on ``chunk`` and ``split``."""

    rows: int
    """Rows of a tile: tokens times the query heads of a KV head."""
    chunk: int
    """Keys that are visited at once."""
    split: int
    """Keys of a split, a multiple of ``chunk``; 0 where all go in one."""
    warps: int
    stages: int


def row_tiles(head_dim: int, group: int, operand: torch.dtype, small: bool = False) -> Tiles:
    """Tiles for decode and verification, with ``group`` query heads per KV head; ``small`` for AMD's shared memory."""
    rows = max(16, triton.next_power_of_2(group))
    if operand is torch.float32:
        return Tiles(rows, 32, 512, 16, 3)  # fewer warps have too few registers for products in float32
    # Blocks have to be loaded before it is known where keys and values are: of five stages that leaves these two, so
    # that the next ones are on their way while a chunk is computed. With three there is one, and memory stands still.
    return Tiles(rows, 64 if head_dim <= 128 else 32, 512, 4, 3 if small else 5)


def prompt_tiles(head_dim: int, group: int, operand: torch.dtype) -> Tiles:
    """Tiles for chunks of prompts, with ``group`` query heads per KV head."""
    if operand is torch.float32:
        return Tiles(max(16, triton.next_power_of_2(group)), 32, 0, 16, 3)
    rows = max(64, triton.next_power_of_2(group))
    return Tiles(rows, 64 if head_dim <= 128 else 32, 0, 4 if head_dim <= 128 else 8, 3)
