"""Processes of this room: training workers, and those that write what others read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forking import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    # The last one comes with the first optimizer, and takes as long as torch itself.
    forks = Forks("slipstream.drafter.training.worker", "slipstream.drafter.traffic.store", "torch._dynamo")
    yield forks
    forks.close()
