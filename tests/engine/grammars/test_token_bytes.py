"""What tokens stand for, in little memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.grammars.token_bytes import TokenBytes


@given(tokens=st.lists(st.binary(max_size=5)), hidden=st.frozensets(st.integers(0, 9)))
def test_is_a_sequence_of_the_bytes_of_each_token(tokens: list[bytes], hidden: frozenset[int]) -> None:
    found = TokenBytes(tokens)
    assert list(found) == tokens
    assert list(found.without(hidden)) == [b"" if token in hidden else data for token, data in enumerate(tokens)]
    assert found[1:3] == tokens[1:3]
    assert len(found) == len(tokens)


@pytest.mark.parametrize("token", [-1, 2])
def test_knows_no_token_before_the_first_and_behind_the_last(token: int) -> None:
    with pytest.raises(IndexError):
        TokenBytes([b"a", b"b"])[token]
