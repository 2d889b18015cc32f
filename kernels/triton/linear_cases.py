"""Cases of Triton's products with matrices; see ``slipstream.kernels.cases``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cases import Case, Prepared, Sizes, Source, called, size
from slipstream.kernels.compute import LayerShape
from slipstream.kernels.triton import grouped, linear, quantized, single
from slipstream.kernels.triton.adapter import GATE_UP, MATRICES, AdapterTable, TritonAdapter
from slipstream.kernels.triton.blocks import FORMS, Form


def cases() -> Iterator[Case]:
    yield Case("linear of a single row", partial(_single, single.single), single.FORMATS)
    yield Case("linear of a single row, cuBLAS", partial(_single, functional.linear), single.FORMATS)
    yield Case("linear, batch-invariant", _linear)
    yield Case("linear, int8", partial(_quantized, "int8"), (torch.bfloat16, torch.float16))
    yield Case("linear, fp8", partial(_quantized, "fp8"), (torch.bfloat16, torch.float16))
    yield Case("linear, int4", partial(_quantized, "int4"), (torch.bfloat16, torch.float16))
    for kinds in _kinds_by_form():
        yield Case(f"linear, packed as {', '.join(kinds)}", partial(_packed, kinds[0]), (torch.bfloat16, torch.float16))
    yield Case("low-rank products", _low_rank)


def _kinds_by_form() -> list[list[str]]:
    """Types of blocks; those that are one kernel are one entry."""
    found: dict[Form, list[str]] = {}
    for kind, form in FORMS.items():
        found.setdefault(replace(form, block=0), []).append(kind)
    return list(found.values())


RANKS = (16, 64, 8, 16)
"""Ranks of the adapters of a batch, in which some tokens have none."""


def _linear(source: Source, sizes: Sizes) -> Prepared:
    x, weight = source.normal(sizes.tokens, sizes.hidden), source.normal(sizes.intermediate, sizes.hidden, scale=0.02)
    moved = size(x, weight) + sizes.tokens * sizes.intermediate * x.element_size()
    flops = 2 * sizes.tokens * sizes.hidden * sizes.intermediate
    return called(lambda: linear.linear(x, weight), lambda: x.float() @ weight.float().T, moved, flops)


def _single(product: Callable[[Tensor, Tensor], Tensor], source: Source, sizes: Sizes) -> Prepared:
    x, weight = source.normal(1, sizes.hidden), source.normal(sizes.intermediate, sizes.hidden, scale=0.02)
    moved, flops = size(x, weight) + sizes.intermediate * x.element_size(), 2 * sizes.hidden * sizes.intermediate
    return called(lambda: product(x, weight), lambda: x.float() @ weight.float().T, moved, flops)


def _quantized(format_: Literal["int8", "fp8", "int4"], source: Source, sizes: Sizes) -> Prepared:
    n, k = sizes.intermediate, sizes.hidden
    x = source.normal(sizes.tokens, k)
    if source.empty:  # packing takes a CPU long, and what is compiled does not depend on numbers
        data = torch.empty(
            n, k // 2 if format_ == "int4" else k, dtype=torch.int8 if format_ == "int8" else torch.uint8
        )
        groups = torch.empty(n, k // 128, dtype=torch.bfloat16), torch.empty(n, k // 128, dtype=torch.uint8)
        scale, zero = groups if format_ == "int4" else (torch.empty(n), None)
        matrix = quantized.QuantizedMatrix(format_, k, data, scale, zero, 128 if format_ == "int4" else 0)
    else:
        weight = source.normal(n, k, scale=0.02)
        if format_ == "int4":
            matrix = quantized.pack_int4(weight, 128 if k % 256 == 0 else 32)
        else:
            matrix = (quantized.pack_int8 if format_ == "int8" else quantized.pack_fp8)(weight)
    moved = size(x) + matrix.num_bytes + sizes.tokens * n * x.element_size()

    def expected() -> Tensor:
        return x.float() @ quantized.unpack(matrix).T

    return called(lambda: quantized.quantized_linear(x, matrix), expected, moved, 2 * sizes.tokens * n * k)


def _packed(kind: str, source: Source, sizes: Sizes) -> Prepared:
    n, k = sizes.intermediate, sizes.hidden
    x = source.normal(sizes.tokens, k)
    matrix = grouped.GroupedMatrix.empty(FORMS[kind], n, k, x.device)
    if not source.empty:
        numbers = source.uniform(*matrix.data.shape)
        matrix.data.copy_(numbers * 256 if matrix.data.dtype is torch.uint8 else numbers * 255 - 127)
        matrix.scale.copy_(source.normal(*matrix.scale.shape, scale=0.01))
        if matrix.lowest is not None:
            matrix.lowest.copy_(source.normal(*matrix.lowest.shape, scale=0.01))
    moved = size(x) + matrix.num_bytes + sizes.tokens * n * x.element_size()

    def expected() -> Tensor:
        return x.float() @ matrix.rows(torch.arange(n, device=x.device)).T

    return called(lambda: grouped.grouped_linear(x, matrix), expected, moved, 2 * sizes.tokens * n * k)


def _low_rank(source: Source, sizes: Sizes) -> Prepared:
    """For the matrices of the gate: tokens with the same adapter lie behind each other."""
    tokens, n = sizes.tokens, 2 * sizes.intermediate
    shape = LayerShape(sizes.hidden, sizes.intermediate, sizes.heads, sizes.kv_heads, sizes.head_dim, 1e-5)
    x, given = source.normal(tokens, sizes.hidden), source.normal(tokens, n)
    numbers = (1 + torch.arange(tokens, device=x.device) * 5 // tokens) % 5
    pairs = [
        [
            (source.normal(rank, sizes.hidden, scale=0.02), source.normal(sizes.intermediate, rank))
            for _ in MATRICES[GATE_UP]
        ]
        for rank in RANKS
    ]
    table = AdapterTable(shape, 1, x.dtype, x.device)
    table.use(
        [TritonAdapter(shape, [dict(zip(MATRICES[GATE_UP], each, strict=True))], x.dtype, x.device) for each in pairs]
    )

    def run() -> Tensor:
        out = given.clone()
        table.add(numbers.int(), 0, GATE_UP, x, out)
        return out

    def expected() -> Tensor:
        out = given.float()
        for number, parts in enumerate(pairs, 1):
            rows = numbers == number
            out[rows] += torch.cat([x[rows].float() @ a.float().T @ b.float().T for a, b in parts], 1)
        return out

    matrices = sum(size(*each) for parts in pairs for each in parts)
    flops = sum(2 * tokens * (2 * sizes.hidden + n) * rank // len(RANKS) for rank in RANKS)
    return called(run, expected, size(x) + 2 * size(given) + matrices, flops)
