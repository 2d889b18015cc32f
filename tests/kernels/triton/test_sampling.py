"""Choosing tokens on the device: the same ones as on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from slipstream.kernels import random
from slipstream.kernels.reference import NEVER, NOTHING, ReferenceOps
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
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    logits[1, [700, vocab - 1]] = 9.0
    logits[2, 5] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = NEVER
    logits[5, : vocab - 1] = NEVER
    logits[6, vocab - 2] = -float("nan")
    logits[7, :] = NEVER
    logits[7, 5] = float("nan")
    expected, expected_likely = REFERENCE.argmax_with_probability(logits)
    assert expected.tolist()[1:] == [700, -1, -1, NOTHING, vocab - 1, -1, -1]
    out, likely = torch.empty(8, dtype=torch.int32, device=DEVICE), torch.empty(8, device=DEVICE)
    assert sampling.argmax(logits, out) is out and out.tolist() == expected.tolist()
    sampling.argmax_with_probability(logits, out, likely)
    assert out.tolist() == expected.tolist()
    torch.testing.assert_close(likely, expected_likely, rtol=1e-5, atol=1e-7)


words = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=16)
@given(
    vocab=st.integers(1, 60) | st.sampled_from([64, sampling.RACE_CHUNK, 2 * sampling.RACE_CHUNK + 77]),
    numbers=st.lists(st.tuples(words, words), min_size=1, max_size=3),
    few=st.booleans(),
    count=st.sampled_from([1, 3]),
    mapped=st.booleans(),
    seed=st.integers(0, 500),
)
def test_the_first_of_a_race_are_the_references(
    vocab: int, numbers: list[tuple[int, int]], few: bool, count: int, mapped: bool, seed: int
) -> None:
    """Up to scores that are equal to one part in 100,000."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(numbers), vocab, generator=generator).mul(3).exp()
    weights[torch.rand(weights.shape, generator=generator) < (0.98 if few else 0.3)] = 0.0
    weights[:, seed % vocab] = 0.5
    ids = torch.randperm(3 * vocab, generator=generator)[:vocab].int() if mapped else None
    seeds, indices = (torch.tensor(column) for column in zip(*numbers, strict=True))
    given_tensors = [weights.to(DEVICE), seeds.to(DEVICE), indices.to(DEVICE)]
    there = None if ids is None else ids.to(DEVICE)
    places, scores = sampling.race(*given_tensors, count, there)
    _, expected = REFERENCE.race(weights, seeds, indices, count, ids)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=0.0)
    # The score of each place is its own: so places are the reference's unless scores are as good as equal.
    key, counter = (column.numpy().view(np.uint64)[:, None] for column in (seeds, indices))
    noise = random.exponential(key, counter, np.arange(vocab) if ids is None else ids.numpy().astype(np.int64))
    at = places.cpu()
    own = (weights.double() / torch.from_numpy(noise)).gather(1, at.clamp(min=0)).masked_fill(at < 0, 0.0)
    torch.testing.assert_close(own, expected.double(), rtol=1e-5, atol=0.0)
    alone = sampling.race(*(each[-1:] for each in given_tensors), count, there)
    assert torch.equal(alone[0][0], places[-1]) and torch.equal(alone[1][0], scores[-1])


def test_the_smallest_and_the_largest_noise_have_their_digits() -> None:
    """Scores of weights of one are the inverse of noise: from 2^-12 or so to some 10."""
    count = 4096
    one, number = torch.ones(1, count), torch.tensor([9])
    _, scores = sampling.race(one.to(DEVICE), number.to(DEVICE), number.to(DEVICE), count)
    _, expected = REFERENCE.race(one, number, number, count, None)
    torch.testing.assert_close(scores.cpu(), expected, rtol=2e-6, atol=0.0)


def test_a_row_without_weight_has_no_first() -> None:
    weights = torch.zeros(2, 50, device=DEVICE)
    weights[1, 20] = 1.0
    numbers = torch.tensor([1, 2], device=DEVICE)
    places, scores = sampling.race(weights, numbers, numbers)
    assert places.tolist() == [[-1], [20]] and scores[0] == 0 and scores[1] > 0
    places, scores = sampling.race(weights[:, 20:22].contiguous(), numbers, numbers, 3)
    assert places.tolist() == [[-1, -1, -1], [0, -1, -1]] and (scores > 0).sum() == 1


def test_what_does_not_fit_is_said() -> None:
    square = torch.ones(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous rows"):
        sampling.argmax(square.t())
    numbers = torch.ones(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="seeds of shape"):
        sampling.race(square, numbers, numbers)
    assert sampling.argmax(square[:0]).shape == (0,)
    assert sampling.race(square[:0], numbers[:0], numbers[:0], 2)[0].shape == (0, 2)
