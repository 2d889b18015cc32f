"""Quantised weights keep every bit of what they stand for, and are computed with in the ways that are told."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.checkpoint.gguf_file import TENSOR_TYPES, TensorType
from slipstream.engine.checkpoint.gguf_file import dequantised as gguf_dequantised
from slipstream.engine.testing.quantised import block_numbers
from slipstream.kernels.compute import Arithmetic
from slipstream.kernels.native import library
from slipstream.kernels.native.quantised import Arena, StoredWeight, form_of, packed_bytes
from slipstream.kernels.native.weight import PANEL, PackedWeight
from slipstream.kernels.stored import Stored

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native kernels on this machine")
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "INT4": [0],
    "INT4_ZERO": [0, 2],
    "INT8": [0],
    "INT8_ZERO": [0, 2],
}
"""Where blocks have their float16."""
KINDS = list(HALVES)
OWN = [TensorType("INT4", 32, 18), TensorType("INT4_ZERO", 32, 20), TensorType("INT8", 32, 34)]
OWN.append(TensorType("INT8_ZERO", 32, 36))
BLOCKS = {kind.name: kind for kind in [*TENSOR_TYPES.values(), *OWN]}
ZEROS = {"INT4_ZERO": (-1, 17), "INT8_ZERO": (-128, 128)}
"""Whole numbers that blocks made of safetensors files have in the place of minima."""
ARITHMETIC: list[Arithmetic] = ["exact", "int16", "int8"]
MOST = {"int8": 127, "int16": 127 * 128}
BF16 = torch.bfloat16


def random_blocks(kind: str, n: int, least_k: int, seed: int = 0) -> Stored:
    """A matrix of at least so many inputs: any bytes are weights, as long as scales are no more than usual."""
    random = np.random.default_rng(seed)
    size = BLOCKS[kind]
    count = -(-least_k // size.block_elements)
    data = random.integers(0, 256, (n, count, size.block_bytes), np.uint8)
    for at in HALVES[kind]:
        data[..., at : at + 2] = random.normal(0, 0.02, (n, count)).astype(np.float16)[..., None].view(np.uint8)
    if kind in ZEROS:
        data[..., 2:4] = random.integers(*ZEROS[kind], (n, count)).astype(np.float16)[..., None].view(np.uint8)
    return Stored(kind, (n, count * size.block_elements), data.reshape(n, -1))


def dequantised(stored: Stored) -> np.ndarray:
    return block_numbers(stored).numpy() if stored.format.startswith("INT") else gguf_dequantised(stored)


def packed(stored: Stored, arithmetic: Arithmetic = "exact", bias: bool = False) -> StoredWeight:
    weight = StoredWeight(*stored.shape, BF16, bias, arithmetic=arithmetic)
    weight.fill(stored)
    return weight


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = torch.int16 if one.dtype is BF16 else torch.int32
    return torch.equal(one.view(bits), other.view(bits))


def quantised_inputs(x: torch.Tensor, most_whole: int) -> torch.Tensor:
    """Inputs as whole numbers times the scale of their block, the largest of which is ``most_whole``."""
    blocks = x.numpy().reshape(len(x), -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(most_whole), most, out=np.zeros_like(most), where=most > 0)
    q = np.rint(blocks.astype(np.float64) * inverse)
    return torch.from_numpy((q * (most / np.float32(most_whole))).reshape(x.shape))


@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 150), k=st.integers(1, 600), data=st.data())
def test_rows_are_to_the_bit_what_the_blocks_stand_for(kind: str, n: int, k: int, data: st.DataObject) -> None:
    stored = random_blocks(kind, n, k)
    weight = StoredWeight(*stored.shape, BF16)
    borders = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    for begin, end in data.draw(st.permutations(list(pairwise(borders)))):
        weight.fill(stored.rows(begin, end - begin), begin)
    order = torch.randperm(n)
    assert same_bits(weight.rows(order), torch.from_numpy(dequantised(stored))[order])
    assert weight.num_bytes == packed_bytes(kind, *stored.shape)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([BF16, torch.float32]),
    n=st.integers(1, 150),
    k=st.integers(1, 600),
    stride=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_panels_of_numbers_are_filled_with_blocks_as_with_numbers(
    kind: str, dtype: torch.dtype, n: int, k: int, stride: int, data: st.DataObject
) -> None:
    stored = random_blocks(kind, n, k)
    panels = 1 + -(-n // PANEL) * stride
    of_blocks, of_numbers = (PackedWeight(panels * PANEL, stored.shape[1], dtype) for _ in range(2))
    for weight in (of_blocks, of_numbers):
        weight.panels.zero_()
    of_numbers.fill(torch.from_numpy(dequantised(stored)), 0, 1, stride)
    borders = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    for begin, end in data.draw(st.permutations(list(pairwise(borders)))):
        of_blocks.fill(stored.rows(begin, end - begin), begin, 1, stride)
    assert same_bits(of_blocks.panels, of_numbers.panels)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@settings(max_examples=80)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 200), k=st.integers(1, 600), rows=st.integers(1, 40))
def test_products_are_those_of_the_numbers(
    isa: str, arithmetic: Arithmetic, kind: str, n: int, k: int, rows: int
) -> None:
    stored = random_blocks(kind, n, k, seed=n)
    weight = packed(stored, arithmetic, bias=True)
    offset = torch.randn(n)
    weight.fill_bias(offset)
    x = torch.randn(rows, stored.shape[1])
    taken = x.double() if arithmetic == "exact" else quantised_inputs(x, MOST[arithmetic]).double()
    matrix = torch.from_numpy(dequantised(stored)).double()
    scale = (taken.abs() @ matrix.abs().T).max()
    assert (weight(x).double() - (taken @ matrix.T + offset)).abs().max() < 2e-6 * scale


@settings(max_examples=80)
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 200), k=st.integers(1, 600), rows=st.integers(1, 40))
def test_rounded_where_they_are_used_they_give_the_bits_of_weights_in_bfloat16(
    isa: str, kind: str, n: int, k: int, rows: int
) -> None:
    stored = random_blocks(kind, n, k, seed=n)
    kept = PackedWeight(*stored.shape, BF16, bias=True)
    kept.fill(torch.from_numpy(dequantised(stored)))
    weight = packed(stored, "bfloat16", bias=True)
    offset = torch.randn(n)
    for each in (kept, weight):
        each.fill_bias(offset)
    x = torch.randn(rows, stored.shape[1])
    assert same_bits(weight(x), kept(x))


@pytest.mark.parametrize("arithmetic", [*ARITHMETIC, "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(isa: str, kind: str, arithmetic: Arithmetic) -> None:
    weight = packed(random_blocks(kind, 176, 512), arithmetic)
    x = torch.randn(33, 512)
    alone = torch.cat([weight(row[None]) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 11, 13, 33):
        assert torch.equal(weight(x[:rows]), alone[:rows])


@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_give_the_same_bits_on_every_variant(isa: str, kind: str, arithmetic: Arithmetic) -> None:
    """Whatever multiplies bytes there, in tiles however tall."""
    weight = packed(random_blocks(kind, 176, 512), arithmetic)
    x = torch.randn(17, 512, generator=torch.Generator().manual_seed(0))
    results = weight(x)
    library.select(next(iter(reversed(library.variants()))))
    assert same_bits(results, weight(x)), isa
    library.select(isa)


@pytest.mark.parametrize("arithmetic", [*ARITHMETIC, "bfloat16"])
def test_what_is_not_finite_is_not_finite_afterwards(isa: str, arithmetic: Arithmetic) -> None:
    weight = packed(random_blocks("Q4_1", 48, 64), arithmetic)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 64)
        x[1, 40] = bad
        assert not weight(x)[1].isfinite().any()
        assert weight(x)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_the_largest_numbers_do_not_overflow(isa: str, arithmetic: Arithmetic) -> None:
    for kind in KINDS:
        stored = random_blocks(kind, 16, 256)
        size, data = BLOCKS[kind], stored.data.reshape(16, -1, BLOCKS[kind].block_bytes)
        scales = {at: data[..., at : at + 2].copy() for at in HALVES[kind]}
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            data[:] = byte
            for at, scale in scales.items():
                data[..., at : at + 2] = scale
            matrix = torch.from_numpy(dequantised(stored)).double()
            for x in (torch.ones(2, 256), -torch.ones(2, 256)):
                expected = x.double() @ matrix.T
                assert torch.allclose(packed(stored, arithmetic)(x).double(), expected, rtol=1e-5, atol=1e-4), size


@settings(max_examples=30)
@given(kinds=st.tuples(*[st.sampled_from([*KINDS, "floats"])] * 3), rows=st.integers(1, 9))
def test_matrices_behind_each_other_have_formats_of_their_own(kinds: tuple[str, ...], rows: int) -> None:
    sizes, k = (96, 32, 48), 256
    weight = StoredWeight(sum(sizes), k, BF16, segments=(0, 6, 8), arena=Arena())
    expected = []
    for kind, count, first in zip(kinds, sizes, (0, 6, 8), strict=True):
        if kind == "floats":
            matrix = torch.randn(count, k)
            weight.fill(matrix, 0, first)
        else:
            stored = random_blocks(kind, count, k, seed=first)
            matrix = torch.from_numpy(dequantised(stored))
            weight.fill(stored, 0, first)
        expected.append(matrix)
    assert weight.is_quantised is ("floats" not in kinds)
    whole = torch.cat(expected) if weight.is_quantised else torch.cat(expected).to(BF16).float()
    for first, matrix in zip((0, 6, 8), whole.split(sizes), strict=True):
        assert torch.equal(weight.rows(torch.arange(len(matrix)), first), matrix)
    x = torch.randn(rows, k).to(BF16).float()
    assert torch.allclose(weight(x), x @ whole.T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("second", ["Q4_1", "Q8_0", "Q5_0", "floats"])
@pytest.mark.parametrize("first", ["Q4_1", "Q8_0"])
def test_matrices_whose_panels_take_turns_are_quantised_if_both_are_alike(first: str, second: str) -> None:
    n, k = 96, 64
    weight, expected = StoredWeight(2 * n, k, torch.float32), []
    for panel, kind in enumerate((first, second)):
        stored = random_blocks("Q4_1" if kind == "floats" else kind, n, k, seed=panel)
        matrix = torch.from_numpy(dequantised(stored))
        for begin in range(0, n, 40):
            rows = matrix[begin : begin + 40] if kind == "floats" else stored.rows(begin, min(40, n - begin))
            weight.fill(rows, begin, panel, 2)
        expected.append(matrix)
    assert weight.is_quantised is (second != "floats" and form_of(first, k) == form_of(second, k))
    for panel, matrix in enumerate(expected):
        assert torch.equal(weight.rows(torch.arange(n), panel, 2), matrix)
    x = torch.randn(5, k)
    out = weight(x).view(5, -1, 2, 16)
    for panel, matrix in enumerate(expected):
        assert torch.allclose(out[:, :, panel].reshape(5, n), x @ matrix.T, atol=1e-4, rtol=1e-4)


def test_memory_is_told_before_it_is_taken() -> None:
    weight = StoredWeight(64, 32, BF16, bias=True)
    assert weight.num_bytes == 64 * 32 * 2 + 64 * 4
    weight.fill(random_blocks("Q8_0", 64, 32))
    assert weight.num_bytes == 64 * (32 + 2) + 64 * 4


@given(st.integers(1, 70), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**16))
def test_numbers_become_blocks_of_eight_bits(n: int, blocks: int, at_once: int, seed: int) -> None:
    """Whatever pieces they come in; and others in their place, as for the next version of a head."""
    generator = torch.Generator().manual_seed(seed)
    weight = StoredWeight(n, 32 * blocks, BF16, arithmetic="int8", numbers_as=("Q8_0",))
    said = weight.num_bytes
    for scale in (1.0, 1e-3):
        numbers = torch.randn(n, 32 * blocks, generator=generator) * scale
        numbers[0, :32] = 0
        for first in range(0, n, at_once):
            weight.fill(numbers[first : first + at_once], first)
        kept = weight.rows(torch.arange(n))
        largest = numbers.view(n, blocks, 32).abs().amax(-1, keepdim=True)
        # Half a step, and what the scale is off by as a float16.
        off = (kept - numbers).view(n, blocks, 32).abs()
        assert bool((off <= largest * (0.5 / 127 + 2**-10) + 1e-7).all())
        x = torch.randn(3, 32 * blocks, generator=generator)
        assert (weight(x) - x @ kept.T).abs().max() <= 0.05 * scale * (32 * blocks) ** 0.5
    assert weight.is_quantised and weight.num_bytes == said < PackedWeight(n, 32 * blocks, BF16).num_bytes


def test_inputs_that_are_no_whole_blocks_stay_numbers() -> None:
    weight = StoredWeight(16, 48, BF16, arithmetic="int8", numbers_as=("Q8_0",))
    numbers = torch.randn(16, 48)
    weight.fill(numbers)
    assert not weight.is_quantised and torch.equal(weight.rows(torch.arange(16)), numbers.bfloat16().float())


@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, BF16, torch.float16]),
    scale=st.sampled_from([0.0, 1e-40, 3e-8, 2e-6, 1e-3, 1.0, 300.0, 8e6]),
    seed=st.integers(0, 99),
)
def test_eight_bits_are_the_nearest_of_a_float16_times_whole_numbers(
    rows: int, blocks: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    numbers = (scale * torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))).to(dtype)
    numbers = numbers.nan_to_num(posinf=6e4, neginf=-6e4)
    weight = StoredWeight(rows, 32 * blocks, BF16, numbers_as=("Q8_0",))
    weight.fill(numbers)
    whole = numbers.float().reshape(-1, 32)
    scales = (whole.abs().amax(1, keepdim=True) / 127).clamp(max=65504).half().float()
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    expected = scales * (whole * inverse).round().clamp(-127, 127)
    assert torch.equal(weight.rows(torch.arange(rows)), expected.reshape(rows, -1))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_become_blocks_of_a_form(kind: str, dtype: torch.dtype) -> None:
    n, k = 40, 512
    numbers = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.03
    numbers[3] += 0.2
    numbers[4], numbers[5, :256], numbers[6] = 0, 1e-6, -numbers[6].abs()
    numbers = numbers.to(dtype)
    weight, form = StoredWeight(n, k, torch.float32), form_of(kind, k)
    weight.take_forms(((0, form),))
    for first in range(0, n, 12):
        weight.fill(numbers[first : first + 12], first)
    assert weight.forms == ((0, form),)
    found, sent = weight.rows(torch.arange(n)), numbers.float()
    four = kind.startswith(("Q4", "INT4"))
    off, size = (found - sent).view(n, -1, 256).abs(), sent.view(n, -1, 256).abs().amax(-1, keepdim=True)
    # Centred numbers of 4 bits are off by a whole step at one end.
    assert bool((off <= size * (0.13 if four else 0.007) + 4e-6).all())
    assert bool((found[4] == 0).all())


def least_lost(numbers: torch.Tensor) -> torch.Tensor:
    """Mean square by which numbers [blocks, 32] are off the 16 places of the least and the most of each."""
    low, high = numbers.aminmax(dim=1, keepdim=True)
    scale, low = ((high - low) / 15).half().float(), low.half().float()
    places = torch.where(scale > 0, (numbers - low) / scale, 0).round().clamp(0, 15)
    return (scale * places + low - numbers).square().mean(1)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 300.0]),
    middle=st.sampled_from([0.0, 0.01, -3.0]),
    seed=st.integers(0, 99),
)
def test_of_four_bits_no_block_is_further_off_than_by_its_least_and_most(
    rows: int, scale: float, middle: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = scale * (torch.randn(rows, 64, generator=generator) + middle)
    weight = StoredWeight(rows, 64, BF16, numbers_as=("Q4_1",))
    weight.fill(numbers)
    found = weight.rows(torch.arange(rows))
    lost = (found - numbers).view(-1, 32).square().mean(1)
    assert bool((lost <= least_lost(numbers.view(-1, 32)) * 1.001 + 1e-14).all())
    again = StoredWeight(rows, 64, BF16, numbers_as=("Q4_1",))
    again.fill(found)
    if scale >= 1e-3:  # smaller ones have few bits as a float16
        assert torch.allclose(again.rows(torch.arange(rows)), found, rtol=0, atol=3e-3 * scale), "nothing is lost again"


def test_of_four_bits_blocks_are_nearer_than_by_their_least_and_most() -> None:
    numbers = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    weight = StoredWeight(64, 576, BF16, numbers_as=("Q4_1",))
    weight.fill(numbers)
    lost = (weight.rows(torch.arange(64)) - numbers).square().mean()
    assert float(lost) < 0.85 * float(least_lost(numbers.view(-1, 32)).mean())


def test_all_threads_pack_what_one_does() -> None:
    numbers = torch.randn(1000, 4800, generator=torch.Generator().manual_seed(0)).to(BF16)
    whole, parts = (StoredWeight(1000, 4800, BF16, numbers_as=("Q4_1",)) for _ in range(2))
    whole.fill(numbers)  # more than pack.cpp's kShared
    for first in range(0, 1000, 300):
        parts.fill(numbers[first : first + 300], first)
    assert torch.equal(whole._parts[0].memory, parts._parts[0].memory)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_kept_are_packed_elsewhere_to_the_bit(kind: str) -> None:
    stored = random_blocks(kind, 70, 512)
    weight = packed(stored)
    other, numbers = (StoredWeight(*stored.shape, torch.float32) for _ in range(2))
    order = torch.arange(70)
    for rows in order.split(32):
        other.fill(weight.kept(rows), int(rows[0]))
    assert other.is_quantised and same_bits(other.rows(order), weight.rows(order))
    numbers.widen()
    numbers.fill(weight.kept(order))
    assert not numbers.is_quantised and same_bits(numbers.rows(order), weight.rows(order))
