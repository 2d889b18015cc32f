from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.errors import ConfigError
from slipstream.engine.units import human_size, parse_size


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (24 << 10, "24.0 KiB"),
        ((24 << 10) + 1023, "24.9 KiB"),
        (512 << 20, "512.0 MiB"),
        (3 << 29, "1.50 GiB"),
    ],
)
def test_sizes_for_people(size: int, said: str) -> None:
    assert human_size(size) == said


@given(st.integers(0, 1 << 50))
def test_what_is_said_can_be_asked_for(size: int) -> None:
    there, enough = (parse_size(human_size(size, least), "kv-cache-memory") for least in (False, True))
    assert 0.9 * size - 1 <= there <= size <= enough <= size * 1.1 + 1


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("100000000", 10**8)])
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "kv-cache-memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1 TiB", "1ib"])
def test_what_is_no_size_is_refused_by_the_option_s_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-memory .* is not a size"):
        parse_size(text, "kv-cache-memory")
