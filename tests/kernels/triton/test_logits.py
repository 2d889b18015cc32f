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
from slipstream.kernels.triton.logits import allow_only, change_logits

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


@settings(max_examples=15)
@given(
    lists=lists_of_tokens,
    parameters=st.lists(st.tuples(st.sampled_from([1.0, 1.3, 0.7]), penalty, penalty), min_size=3, max_size=3),
    least=st.sampled_from([-1, 0]),
    seed=st.integers(0, 99),
)
def test_changes_have_the_references_bits(
    lists: list[list[int]], parameters: list[tuple[float, float, float]], least: int, seed: int
) -> None:
    """The last rows of some, in another order; a ban is final, whatever the logit was."""
    logits = some_logits(len(lists) + 1, seed)
    logits[1, lists[-1][:1]] = float("nan")
    expected = logits.clone()
    rows = torch.arange(len(lists), 0, -1, dtype=torch.int32, device=DEVICE)
    counts = [[i % 5 * (i % 7) + least for i in range(len(tokens))] for tokens in lists]
    added = [[NEVER if i % 3 == 0 else i % 2 * (i * 0.1 - 1) for i in range(len(tokens))] for tokens in lists]
    place = [[row] * len(tokens) for row, tokens in enumerate(lists)]
    columns = [torch.tensor(column, device=DEVICE) for column in list(zip(*parameters, strict=True))]
    columns = [column[: len(lists)] for column in columns]
    changes = (joined(place), joined(lists), joined(added, torch.float32), joined(counts))
    given_changes = (rows, *(each[:-1] for each in changes), *columns)
    for row, (tokens, more, times, (repetition, frequency, presence)) in enumerate(
        zip(lists, added, counts, parameters, strict=False)
    ):
        for token, plus, count in zip(tokens, more, times, strict=True):
            x = expected[len(lists) - row, token].clone()
            x = x + plus if plus not in (0.0, NEVER) else torch.tensor(NEVER) if plus == NEVER else x
            if count >= 0:
                x = x / repetition if x > 0 else x * repetition
            if count > 0:
                x = x - (torch.tensor(frequency) * count + torch.tensor(presence))
            expected[len(lists) - row, token] = x
    plain = logits.clone()
    REFERENCE.change_logits(plain, *given_changes)
    change_logits(logits, *given_changes)
    torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(logits.nan_to_num(7e7), plain.nan_to_num(7e7))


def test_tokens_outside_the_vocabulary_change_nothing() -> None:
    logits = some_logits(2, 0)
    expected = logits.clone()

    def whole(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)

    one = torch.ones(1, device=DEVICE)
    change_logits(
        logits, whole(0), whole(0, 0), whole(VOCAB, -1), torch.ones(2, device=DEVICE), whole(1, 1), one, one, one
    )
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
    few, one = joined([[1]]), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="2 tokens, 1 places"):
        change_logits(some_logits(2, 0), few, few[:1], few, few.float(), few, one, one, one)
