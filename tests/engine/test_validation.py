"""Every place where a request can name a token is looked at, and every number has a range."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.validation import RANGES, ForeignToken, foreign_token, problem

VOCAB = 40
HOLDERS = {
    "prompt": lambda token: {},
    "logit_bias": lambda token: {"logit_bias": {3: 1.0, token: 1.0}},
    "allowed_token_ids": lambda token: {"allowed_token_ids": (3, token)},
    "stop_token_ids": lambda token: {"stop_token_ids": (3, token)},
    "logprob_token_ids": lambda token: {"logprob_token_ids": (3, token)},
    "bad_words": lambda token: {"bad_words": ((1,), (3, token, 2))},
}


@given(field=st.sampled_from(sorted(HOLDERS)), token=st.integers() | st.integers(-3, VOCAB + 3))
def test_a_token_is_found_wherever_it_stands(field: str, token: int) -> None:
    prompt = [1, token, 2] if field == "prompt" else [1, 2]
    found = foreign_token([[1], prompt], SamplingParams(max_tokens=1, **HOLDERS[field](token)), VOCAB)
    assert found == (None if 0 <= token < VOCAB else ForeignToken(field, token))


def test_no_list_of_ids_is_forgotten() -> None:
    lists = {f.name for f in msgspec.structs.fields(SamplingParams) if "tuple" in str(f.type) or "dict" in str(f.type)}
    assert lists == HOLDERS.keys() - {"prompt"}
    assert len(fields(ForeignToken)) == 2


def test_no_number_is_forgotten() -> None:
    numbers = {f.name for f in msgspec.structs.fields(SamplingParams) if f.type in (int, float, "int", "float")}
    assert numbers == RANGES.keys()


@pytest.mark.parametrize("field", sorted(RANGES))
def test_a_range_holds_its_ends_and_nothing_beyond(field: str) -> None:
    def wrong(value: Any) -> str | None:
        params = SamplingParams(**({"max_tokens": 1} | {field: value}))
        return problem(NewRequest(request_id=1, prompt=[1], params=params), VOCAB, 10)

    low, high = RANGES[field]
    assert wrong(low) is None and wrong(high) is None
    for value in (low - 1, high + 1, float("nan"), float("inf"), 10**400):
        assert field in str(wrong(value))
