"""Choosing tokens on the device: the same ones as on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slipstream.kernels import random
from slipstream.kernels.reference import NEVER, ReferenceOps
from slipstream.kernels.triton import launch, sampling

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEVERAL_CHUNKS = 2 * sampling.CHUNK + 100


@settings(max_examples=10)
@given(
    rows=st.integers(1, 3),
    vocab=st.integers(1, 60) | st.sampled_from([sampling.CHUNK, SEVERAL_CHUNKS]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_argmax_and_its_probability_are_the_references(
    rows: int, vocab: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    logits = torch.randn(rows, vocab + 5, generator=torch.Generator().manual_seed(seed))[:, :vocab] * scale
    logits = logits.to(DEVICE, dtype)
    found, likely = sampling.argmax_with_probability(logits)
    expected, expected_likely = REFERENCE.argmax_with_probability(logits.float())
    assert found.tolist() == expected.tolist() == sampling.argmax(logits).tolist()
    torch.testing.assert_close(likely, expected_likely, rtol=1e-5, atol=1e-7)
    alone, alone_likely = sampling.argmax_with_probability(logits[-1:])
    assert alone[0] == found[-1] and alone_likely[0] == likely[-1]


@pytest.mark.parametrize("vocab", [1001, SEVERAL_CHUNKS])
def test_argmax_takes_the_first_largest_and_refuses_broken_rows(vocab: int) -> None:
    logits = torch.randn(7, vocab, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    logits[1, [700, vocab - 1]] = 9.0
    logits[2, 5] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = NEVER
    logits[5, : vocab - 1] = NEVER
    logits[6, vocab - 2] = -float("nan")
    expected, expected_likely = REFERENCE.argmax_with_probability(logits)
    assert expected.tolist()[1:] == [700, -1, -1, -1, vocab - 1, -1]
    out, likely = torch.empty(7, dtype=torch.int32, device=DEVICE), torch.empty(7, device=DEVICE)
    assert sampling.argmax(logits, out) is out and out.tolist() == expected.tolist()
    sampling.argmax_with_probability(logits, out, likely)
    assert out.tolist() == expected.tolist()
    torch.testing.assert_close(likely, expected_likely, rtol=1e-5, atol=1e-7)


words = st.integers(0, 2**64 - 1)


@settings(max_examples=10)
@given(numbers=st.lists(st.tuples(words, words), min_size=1, max_size=300), stream=st.sampled_from([0, 1, 7]))
def test_random_numbers_have_the_bits_of_those_on_the_cpu(numbers: list[tuple[int, int]], stream: int) -> None:
    keys, counters = (np.array(column, np.uint64) for column in zip(*numbers, strict=True))
    given_words = (torch.from_numpy(array.view(np.int32).reshape(-1, 2)).to(DEVICE) for array in (keys, counters))
    found = sampling.uniform(*given_words, stream)
    assert np.array_equal(found.cpu().numpy(), random.uniform(keys, counters, stream))


@settings(max_examples=12)
@given(
    vocab=st.integers(1, 60) | st.sampled_from([sampling.DRAW_CHUNK, 2 * sampling.DRAW_CHUNK + 77]),
    rows=st.integers(1, 3),
    few=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 500),
)
def test_the_reference_draws_the_same_tokens(vocab: int, rows: int, few: bool, index: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, vocab, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < (0.98 if few else 0.3)] = 0.0
    weights[:, seed % vocab] = 0.5
    weights, shares = weights.to(DEVICE), torch.rand(rows, generator=generator, dtype=torch.float64).to(DEVICE)
    shares[0] = [0.0, 1 - 2.0**-53, 0.5][seed % 3]
    found = sampling.draw(weights, shares, torch.empty(rows, dtype=index, device=DEVICE))
    assert found.tolist() == REFERENCE.draw(weights, shares).tolist()
    assert (weights.gather(1, found.long()[:, None]) > 0).all()
    assert sampling.draw(weights[-1:], shares[-1:])[0] == found[-1]


def test_a_row_without_weight_gives_some_token() -> None:
    weights = torch.zeros(2, 50, device=DEVICE)
    weights[1, 20] = 1.0
    assert sampling.draw(weights, torch.tensor([0.5, 0.5], device=DEVICE)).tolist() == [0, 20]


def test_what_does_not_fit_is_said() -> None:
    square = torch.ones(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous rows"):
        sampling.argmax(square.t())
    with pytest.raises(ValueError, match="shares of shape"):
        sampling.draw(square, torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="keys of shape"):
        sampling.uniform(torch.zeros(2, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32))
    assert sampling.argmax(square[:0]).shape == sampling.draw(square[:0], square[0, :0]).shape == (0,)
