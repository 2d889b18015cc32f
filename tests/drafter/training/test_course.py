"""How fast a head learns follows what the gate says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slipstream.drafter.traffic.store import TrafficStore
from slipstream.drafter.training.course import LEAST_RATE, LIVE_RATE, Course, WorkerOptions
from slipstream.drafter.training.gate import Score, Verdict, judge
from slipstream.drafter.training.target import Target


@pytest.fixture
def course(target_folder: Path, tmp_path: Path) -> Iterator[Course]:
    options = WorkerOptions(model=str(target_folder), traffic="", registry="", learning_rate=8e-3)
    store = TrafficStore(tmp_path)
    yield Course(options, "", Target(str(target_folder), 64, 256), store)
    store.close()


def verdict(steps: float, noise: int = 0, texts: int = 40) -> Verdict:
    """A head takes so many times the verification steps that the live one takes, on texts of 1,000 tokens."""
    tokens = np.full(texts, 1000)
    live = np.stack([tokens, np.full(texts, 500)], 1)
    found = live.copy()
    found[:, 1] = found[:, 1] * steps + noise * np.where(np.arange(texts) % 2, 1, -1)
    return judge(Score(tokens, found), Score(tokens, live))


def test_a_round_that_made_it_worse_is_learned_again_in_smaller_steps(course: Course) -> None:
    rates = []
    while course.steps_back(verdict(1.05, noise=10), 1000):
        rates.append(course.options().learning_rate)
    assert rates == [8e-3 / 2**power for power in range(1, 6)]
    assert course.rate == LEAST_RATE, "or it would learn the same texts for ever"


def test_what_may_be_chance_changes_nothing(course: Course) -> None:
    course.rate = LIVE_RATE
    for steps in (0.99, 1.0, 1.01):
        assert not course.steps_back(verdict(steps, noise=100), 1000) and course.rate == LIVE_RATE
    for steps in (0.5, 2.0):
        assert not course.steps_back(verdict(steps, texts=4), 1000) and course.rate == LIVE_RATE


def test_other_weights_are_learned_in_large_steps_again(course: Course) -> None:
    course.rate = LIVE_RATE
    course.target_changed()
    assert course.rate == 1


def test_a_head_that_is_far_from_what_comes_learns_in_larger_steps(course: Course) -> None:
    course.rate = LIVE_RATE
    rates = []
    for _ in range(5):
        assert not course.steps_back(verdict(0.8, noise=10), 1000)
        rates.append(course.rate)
    assert rates == [0.25, 0.5, 1.0, 1.0, 1.0]
