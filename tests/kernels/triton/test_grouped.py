"""Matrices that stay as GGUF files hold them: the numbers of the file, and exactly their product."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from slipstream.engine.testing.quantised import block_numbers
from slipstream.kernels.stored import Stored
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.blocks import FORMS, READERS, form_of
from slipstream.kernels.triton.grouped import GroupedMatrix, GroupedWeight, JoinedWeight, grouped_bytes, grouped_linear
from slipstream.kernels.triton.linear import Split
from slipstream.kernels.weight import DenseWeight

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
ZEROS = {"INT4_ZERO": 16, "INT8_ZERO": 128}
"""Whole numbers in blocks, and below what they are."""
"""Bytes of a block at which there are scales, where that is not the first one alone."""


def stored(kind: str, n: int, k: int, seed: int = 0) -> Stored:
    """Any bits, but for scales."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (n, k // FORMS[kind].block, READERS[kind][0]), np.uint8)
    for place in SCALES.get(kind, (0,)):
        scales = generator.uniform(-0.1, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = scales[..., None].view(np.uint8)
    if kind in ZEROS:
        zeros = generator.integers(0, ZEROS[kind], blocks.shape[:2]).astype(np.float16)
        blocks[:, :, 2:4] = zeros[..., None].view(np.uint8)
    return Stored(kind, (n, k), blocks.reshape(n, -1))


def numbers(blocks: Stored) -> Tensor:
    """As the authors of the format read them."""
    if blocks.format.startswith("INT"):
        return block_numbers(blocks).to(DEVICE)
    found = gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType[blocks.format])
    return torch.from_numpy(found).to(DEVICE)


def matrix_of(blocks: Stored) -> GroupedMatrix:
    form = form_of(blocks.format, blocks.shape[1])
    assert form is not None
    made = GroupedMatrix.empty(form, *blocks.shape, DEVICE)
    made.fill(blocks.rows(0, 2))
    made.fill(blocks.rows(2, blocks.shape[0] - 2), 2)
    return made


@pytest.mark.parametrize("kind", FORMS)
def test_it_holds_the_numbers_of_the_file(kind: str) -> None:
    blocks = stored(kind, 5, 768 if FORMS[kind].block == 256 else 96)
    made = matrix_of(blocks)
    assert torch.equal(made.rows(torch.tensor([4, 0, 2], device=DEVICE)), numbers(blocks)[[4, 0, 2]])
    assert made.num_bytes == grouped_bytes(kind, *blocks.shape) < blocks.shape[0] * blocks.shape[1] * 1.4
    assert form_of(kind, 100) is None and not grouped_bytes(kind, 5, 100) and not grouped_bytes("Q2_K", 5, 256)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "tile_rows"),
    [(torch.bfloat16, 17, 65, 1536, 0), (torch.float16, 3, 20, 256, 64), (torch.float32, 2, 40, 512, 0)],
)
def test_it_is_the_exact_product_rounded_and_rows_have_the_same_bits_alone(
    kind: str, dtype: torch.dtype, m: int, n: int, k: int, tile_rows: int
) -> None:
    blocks = stored(kind, n, k + (32 if FORMS[kind].block == 32 and dtype is torch.float16 else 0))
    k = blocks.shape[1]
    matrix, generator = matrix_of(blocks), torch.Generator().manual_seed(1)
    x = torch.randn(m, k + 2, generator=generator).to(DEVICE, dtype)[:, 1 : k + 1]
    bias = torch.randn(n, generator=generator).to(DEVICE, dtype)
    found = grouped_linear(x, matrix, bias, tile_rows)
    exact = x.double() @ numbers(blocks).double().T + bias.double()
    lost = (x.double().abs() @ numbers(blocks).double().abs().T).amax() * 3e-6
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING[dtype], atol=float(lost))
    assert found.dtype is dtype
    alone = grouped_linear(x[-1:], matrix, bias, tile_rows or (16 if m <= 16 else 64))
    assert torch.equal(alone[0], found[-1])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_bits_are_the_same_whether_parts_are_computed_together_or_apart(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    matrix = matrix_of(stored(kind, 40, 1536))
    x = torch.randn(4, 1536, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    assert Split.of(40, 1536, 64, 64).count > 1
    apart = grouped_linear(x, matrix)
    monkeypatch.setattr(Split, "apart", lambda *sizes: False)
    assert torch.equal(grouped_linear(x, matrix), apart)


def weight(n: int, k: int, bias: bool = False) -> GroupedWeight:
    make = lambda: DenseWeight(n, k, torch.float32, DEVICE, bias)  # noqa: E731
    return GroupedWeight(n, k, DEVICE, make, torch.float32, bias)


def test_numbers_and_blocks_of_other_forms_make_a_matrix_dense() -> None:
    """With nothing lost, and the bias that it had."""
    blocks, other = stored("Q4_1", 6, 64), stored("Q8_0", 6, 64, 1)
    x, bias = torch.ones(1, 64, device=DEVICE), torch.arange(6.0, device=DEVICE)
    rows = torch.arange(6, device=DEVICE)
    for late in (other.rows(0, 2), torch.full((2, 64), 0.25, device=DEVICE)):
        made = weight(6, 64, bias=True)
        made.fill_bias(bias)
        made.fill(blocks)
        small = made.num_bytes
        assert torch.equal(made.rows(rows), numbers(blocks))
        made.fill(late, 2)
        expected = numbers(blocks)
        expected[2:4] = numbers(late) if isinstance(late, Stored) else late
        assert torch.equal(made.rows(rows), expected) and made.num_bytes > 2 * small
        torch.testing.assert_close(made(x), x @ expected.T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", FORMS)
def test_numbers_are_packed_in_the_form_that_it_was_told(kind: str) -> None:
    """As nearly as the form can have them, in parts and in any order; what was told of rows comes back to the bit."""
    form, generator = FORMS[kind], torch.Generator().manual_seed(3)
    x = torch.randn(6, 256 if form.block == 256 else 96, generator=generator).to(DEVICE) + 0.3
    x[1, :40] = 0.0
    made, other = weight(6, x.shape[1]), weight(6, x.shape[1])
    made.take_forms(form)
    made.fill(x[4:], 4)
    made.fill(x[:4])
    assert made.forms == form and made.num_bytes == grouped_bytes(kind, *x.shape)
    rows = torch.arange(6, device=DEVICE)
    groups = x.view(6, -1, form.group)
    low, high = groups.amin(-1), groups.amax(-1)
    step = (high - low) / (15 if form.bits == 4 else 254) if form.has_lowest else torch.maximum(high, -low) / 127
    off = (made.rows(rows).view_as(groups) - groups).abs()
    # Of four bits a few numbers are cut off, so that the others are nearer.
    off = off.square().mean(-1).sqrt() / 0.6 if form == FORMS["Q4_1"] else off.amax(-1)
    assert bool((off <= 0.51 * step + 1e-3 * groups.abs().amax(-1)).all())
    for some in (rows[3:], rows[:3]):
        other.fill(made.kept(some), int(some[0]))
    assert torch.equal(other.rows(rows), made.rows(rows)) and other.num_bytes == made.num_bytes
    made.widen()
    made.fill(x[2:3], 2)
    assert torch.equal(made.rows(rows[2:3]), x[2:3]) and torch.equal(made.rows(rows[3:]), other.rows(rows[3:]))
    assert isinstance(made.kept(rows), Tensor)


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.55 / 127), ("Q4_1", 0.1)])
def test_numbers_become_blocks(kind: str, most: float) -> None:
    sent = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sent[1, :32] = 0
    sent[2, 32:64] = 0.25
    made = GroupedWeight(
        6, 96, DEVICE, lambda: DenseWeight(6, 96, torch.float32, DEVICE, False), torch.float32, numbers_as=kind
    )
    said = made.num_bytes
    for first in range(0, 6, 4):
        made.fill(sent[first : first + 4], first)
    found = made.rows(torch.arange(6, device=DEVICE))
    assert made.num_bytes == said == grouped_bytes(kind, 6, 96)
    off, size = (found - sent).view(-1, 32).abs(), sent.view(-1, 32).abs().amax(1, keepdim=True)
    assert bool((off <= most * size + 1e-4).all())
    odd = GroupedWeight(
        2, 40, DEVICE, lambda: DenseWeight(2, 40, torch.float32, DEVICE, False), torch.float32, numbers_as=kind
    )
    odd.fill(sent[:2, :40])
    assert torch.equal(odd.rows(torch.arange(2, device=DEVICE)), sent[:2, :40]), "rows that are no whole blocks"


def test_matrices_under_one_another_are_one_product() -> None:
    parts = [weight(4, 64), weight(3, 64)]
    blocks = stored("Q5_0", 4, 64), stored("Q4_0", 3, 64)
    for part, each in zip(parts, blocks, strict=True):
        part.fill(each)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    joined = JoinedWeight(parts)
    assert joined.num_bytes == sum(part.num_bytes for part in parts)
    torch.testing.assert_close(joined(x), x @ torch.cat([numbers(each) for each in blocks]).T, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="the product of"):
        grouped_linear(torch.ones(3, 32, device=DEVICE), matrix_of(stored("Q4_0", 3, 64)))
