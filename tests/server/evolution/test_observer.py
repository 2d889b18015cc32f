"""Drift: whether the live drafter is as often right as the gate saw, whatever is verified of what it proposes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from slipstream.server.evolution.observer import DRIFT_REQUESTS, Observer


def ended(observer: Observer, proposals: int, right: int, steps: int, streams: int = 1, version: int = 1) -> None:
    """A request of so many steps in which nothing was verified."""
    metrics = SimpleNamespace(
        steps=steps, num_accepted=0, learned_steps=steps, learned_accepted=0, proposals=proposals, first_right=right
    )
    observer.ended(version, streams, cast(Any, metrics))


def test_drafting_that_does_not_pay_here_is_no_drift() -> None:
    observer = Observer()
    for _ in range(DRIFT_REQUESTS):
        ended(observer, proposals=5, right=2, steps=200)
    assert observer.accept_length == 1.0
    assert observer.drift(0.4) == pytest.approx(1.0) and not observer.has_drifted(0.4)


@pytest.mark.parametrize("streams", [1, 64])
def test_traffic_on_which_it_is_rarely_right_is_drift_which_is_said_once(streams: int) -> None:
    observer = Observer()
    for _ in range(DRIFT_REQUESTS):
        ended(observer, proposals=5, right=1, steps=200, streams=streams)
    assert observer.drift(0.5) == pytest.approx(1.2 / 1.5)
    assert [observer.has_drifted(0.5) for _ in range(2)] == [True, False]
    for _ in range(DRIFT_REQUESTS):
        ended(observer, proposals=5, right=1, steps=200, version=2)
    assert observer.has_drifted(0.5), "of another version"


@pytest.mark.parametrize("proposals", [0, 1])
def test_of_few_proposals_nothing_is_said(proposals: int) -> None:
    observer = Observer()
    for _ in range(DRIFT_REQUESTS):
        ended(observer, proposals=proposals, right=0, steps=200)
    assert observer.first_right is None and observer.drift(0.5) == 1.0 and not observer.has_drifted(0.5)


def test_of_a_version_that_was_never_gated_nothing_is_said() -> None:
    observer = Observer()
    for _ in range(DRIFT_REQUESTS):
        ended(observer, proposals=5, right=0, steps=200)
    assert observer.drift(None) == 1.0 and not observer.has_drifted(None)
