"""Penalties, biases and bans of many rows in one launch: what the reference does to one row after the other."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from slipstream.kernels.reference import NEVER, ReferenceOps
from slipstream.kernels.triton import launch
from slipstream.kernels.triton.logits import add_to_logits, allow_only, penalize_rows

DEVICE = torch.device("cpu" if launch.is_interpreted() else "cuda")
REFERENCE = ReferenceOps()
VOCAB = 3000


def starts(lists: list[list[int]]) -> Tensor:
    return torch.tensor([0, *accumulate(map(len, lists))], dtype=torch.int32, device=DEVICE)


def joined(lists: list[list[int]], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([number for some in lists for number in some] + [VOCAB + 9], dtype=dtype, device=DEVICE)


def some_logits(rows: int, seed: int) -> Tensor:
    return (torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 5).to(DEVICE)


few = st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=5)
many = st.integers(1, VOCAB).map(lambda n: list(range(VOCAB - n, VOCAB)))
lists_of_tokens = st.lists(few | many, min_size=1, max_size=3)
penalty = st.sampled_from([0.0, 0.3, -1.5])


@settings(max_examples=10)
@given(
    lists=lists_of_tokens,
    parameters=st.lists(st.tuples(st.sampled_from([1.0, 1.3, 0.7]), penalty, penalty), min_size=3, max_size=3),
    every=st.integers(1, 3),
    counted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_penalties_have_the_references_bits(
    lists: list[list[int]], parameters: list[tuple[float, float, float]], every: int, counted: bool, seed: int
) -> None:
    logits = some_logits(len(lists), seed)
    expected = logits.clone()
    counts = [[i % every * (i % 7) for i in range(len(tokens))] for tokens in lists]
    for row, (tokens, times, (repetition, frequency, presence)) in enumerate(
        zip(lists, counts, parameters, strict=False)
    ):
        output = [(token, count) for token, count in zip(tokens, times, strict=True) if count and counted]
        REFERENCE.penalize(
            expected,
            row,
            torch.tensor(tokens, dtype=torch.long, device=DEVICE),
            repetition,
            torch.tensor([token for token, _ in output], dtype=torch.long, device=DEVICE),
            torch.tensor([float(count) for _, count in output], device=DEVICE),
            frequency,
            presence,
        )
    columns = (torch.tensor(column, device=DEVICE) for column in zip(*parameters, strict=True))
    given_counts = joined(counts) if counted else None
    penalize_rows(logits, starts(lists), joined(lists), given_counts, *columns)
    assert torch.equal(logits, expected)


@settings(max_examples=10)
@given(lists=lists_of_tokens, index=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 99))
def test_biases_are_added_and_bans_are_final(lists: list[list[int]], index: torch.dtype, seed: int) -> None:
    logits = some_logits(len(lists), seed)
    for row, tokens in enumerate(lists):
        logits[row, tokens[:1]] = float("nan")
    expected = logits.clone()
    values = [[NEVER if i % 3 == 0 else i * 0.1 - 1 for i in range(len(tokens))] for tokens in lists]
    for row, (tokens, added) in enumerate(zip(lists, values, strict=True)):
        expected[row, tokens] += torch.tensor(added, device=DEVICE)
        expected[row, tokens[::3]] = NEVER
    add_to_logits(logits, starts(lists), joined(lists, index), joined(values, torch.float32))  # type: ignore[arg-type]
    assert torch.equal(logits, expected)


@settings(max_examples=10)
@given(lists=lists_of_tokens, seed=st.integers(0, 99))
def test_only_the_tokens_of_a_list_are_left(lists: list[list[int]], seed: int) -> None:
    lists = [sorted(tokens) for tokens in lists]
    logits = some_logits(len(lists), seed)
    expected = logits.clone()
    for row, tokens in enumerate(lists):
        if tokens:
            expected[row] = NEVER
            expected[row, tokens] = logits[row, tokens]
    allow_only(logits, starts(lists), joined(lists))
    assert torch.equal(logits, expected)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="starts of shape"):
        allow_only(some_logits(2, 0), starts([[1]]), joined([[1]]))
