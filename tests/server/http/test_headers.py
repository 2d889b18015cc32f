"""What headers say, as it is read where bodies are."""

import sys

import pytest

from slipstream.server.http.headers import content_length


@pytest.mark.parametrize(
    ("said", "length"),
    [(None, 0), ("", 0), ("0", 0), ("12 ", 12), ("-1", sys.maxsize), ("1e3", sys.maxsize), ("9" * 5000, sys.maxsize)],
)
def test_a_length_that_is_no_number_is_more_than_any_limit(said: str | None, length: int) -> None:
    headers = [] if said is None else [(b"content-length", said.encode())]
    assert content_length({"headers": headers}) == length
