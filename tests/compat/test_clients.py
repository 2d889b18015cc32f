"""Clients that people use, in pinned versions and each in an environment of its own, unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from compat_clients import CLIENTS, default_server, names_of, table, try_out


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, str]]:
    with default_server() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_it_gets_what_it_asks_for(served: tuple[str, str], name: str) -> None:
    found, printed = try_out(CLIENTS[name], *served)
    assert found and all(each["ok"] for each in found), printed


def test_rows_of_the_table_are_told_apart() -> None:
    for name in CLIENTS:
        row = table({name: [{"feature": "chat", "ok": True}]}).splitlines()[-1]
        assert names_of(row) == [name]
