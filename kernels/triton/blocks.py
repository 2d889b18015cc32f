"""Blocks taken apart: numbers of few bits, and a scale and a lowest number of each group of them.

Layouts are those of llama.cpp, whose authors call them ggml types, and those that quantised safetensors files are made
blocks of: the same, or with a zero in the place of the lowest number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """How blocks of a type are kept."""

    block: int
    """Numbers of a block in the file."""
    group: int
    bits: int
    has_lowest: bool
    scales: torch.dtype
    """Which has all scales of the type exactly, but for products of two in float32."""


FORMS = {
    "Q4_0": Form(32, 32, 4, True, torch.float16),
    "Q4_1": Form(32, 32, 4, True, torch.float16),
    "Q5_0": Form(32, 32, 8, False, torch.float16),
    "Q5_1": Form(32, 32, 8, True, torch.float16),
    "Q8_0": Form(32, 32, 8, False, torch.float16),
    "Q4_K": Form(256, 32, 4, True, torch.float32),
    "Q5_K": Form(256, 32, 8, True, torch.float32),
    "Q6_K": Form(256, 16, 8, False, torch.float32),
    "INT4": Form(32, 32, 4, True, torch.float16),
    "INT4_ZERO": Form(32, 32, 4, True, torch.float32),
    "INT8": Form(32, 32, 8, False, torch.float16),
    "INT8_ZERO": Form(32, 32, 8, True, torch.float32),
}


def form_of(kind: str, k: int) -> Form | None:
    """The form of rows of k numbers of this type; None if there is none."""
    form = FORMS.get(kind)
    return form if form is not None and k % form.block == 0 else None


Read = tuple[Tensor, Tensor, Tensor | None]
"""Stored numbers [rows, blocks, numbers], and scales and lowest numbers [rows, blocks, groups] float32."""


def _halves(blocks: Tensor, first: int, count: int = 1) -> Tensor:
    """float16 numbers from a byte on, as float32 [rows, blocks, count]."""
    return blocks[..., first : first + 2 * count].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """The low bits of bytes [..., n], then the high ones: [..., 2 n]."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth(blocks: Tensor, first: int) -> Tensor:
    """The fifth bits of 32 numbers, as 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[..., first : first + 4, None] >> shifts & 1) << 4).flatten(-2)


def _q4_0(blocks: Tensor) -> Read:
    scale = _halves(blocks, 0)
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(blocks: Tensor) -> Read:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Read:
    return (_nibbles(blocks[..., 6:]) | _fifth(blocks, 2)).to(torch.int8) - 16, _halves(blocks, 0), None


def _q5_1(blocks: Tensor) -> Read:
    return _nibbles(blocks[..., 8:]) | _fifth(blocks, 4), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Read:
    return blocks[..., 2:].view(torch.int8), _halves(blocks, 0), None


def _int4_zero(blocks: Tensor) -> Read:
    scale = _halves(blocks, 0)
    return _nibbles(blocks[..., 4:]), scale, -scale * _halves(blocks, 2)


def _int8_zero(blocks: Tensor) -> Read:
    scale = _halves(blocks, 0)
    return blocks[..., 4:].view(torch.int8), scale, -scale * _halves(blocks, 2)


def _scales_of_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lowest numbers of 8 groups: 6 bits each, times one of the block."""
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale = torch.cat((low & 63, high & 15 | low >> 6 << 4), dim=-1)
    least = torch.cat((middle & 63, high >> 4 | middle >> 6 << 4), dim=-1)
    return _halves(blocks, 0) * scale.float(), -_halves(blocks, 2) * least.float()


def _q4_k(blocks: Tensor) -> Read:
    scale, lowest = _scales_of_k(blocks)
    return _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(-2), scale, lowest


def _q5_k(blocks: Tensor) -> Read:
    scale, lowest = _scales_of_k(blocks)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[..., None, 16:48] >> shifts & 1) << 4
    return _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2) | fifth.flatten(-2), scale, lowest


def _q6_k(blocks: Tensor) -> Read:
    # Of 128 numbers: those of 64 bytes' low bits, then of their high ones.
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    shifts = 2 * torch.arange(4, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3) << 4
    numbers = (low | high.flatten(-2)).flatten(-2).to(torch.int8) - 32
    return numbers, _halves(blocks, 208) * blocks[..., 192:208].view(torch.int8).float(), None


READERS: dict[str, tuple[int, Callable[[Tensor], Read]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "INT4": (18, _q4_0),
    "INT4_ZERO": (20, _int4_zero),
    "INT8": (34, _q8_0),
    "INT8_ZERO": (36, _int8_zero),
}
"""Bytes of a block, and what reads blocks [rows, blocks, bytes]."""
