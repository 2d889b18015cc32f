import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.training.gate import Score, Speed, judge


def drafted(rate: float, texts: int, seed: int, depth: int = 3) -> Score:
    """Answers of 100 tokens with so many accepted draft tokens."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(texts):
        right = (rng.random((100, depth)) < rate).cumprod(1).sum(1)
        row = []
        for most in range(depth + 1):
            at = count = 0
            while at < 100:
                at += 1 + min(int(right[at]), most)
                count += 1
            row.append(count)
        steps.append(row)
    return Score(np.full(texts, 100), np.array(steps))


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_a_better_head_passes_and_a_worse_one_does_not(seed: int) -> None:
    assert judge(drafted(0.6, 100, seed), drafted(0.4, 100, seed + 1)).passes
    assert not judge(drafted(0.4, 100, seed), drafted(0.6, 100, seed + 1)).passes


def test_an_equal_head_seldom_passes() -> None:
    passed = sum(judge(drafted(0.5, 60, 2 * s), drafted(0.5, 60, 2 * s + 1)).passes for s in range(100))
    assert passed <= 9  # 2.5 in 100 are expected


def test_nothing_to_judge_by_passes_nothing() -> None:
    empty = Score(np.zeros(0, np.int64), np.zeros((0, 4), np.int64))
    verdict = judge(empty, empty)
    assert not verdict.passes and verdict.texts == verdict.different == 0


def test_any_head_is_better_than_none_if_it_drafts() -> None:
    found = drafted(0.5, 50, 0)
    verdict = judge(found, found.without_drafting())
    assert verdict.passes and verdict.live_accept_length == 1
    assert verdict.accept_length == found.accept_length(3) == pytest.approx(1.875, rel=0.1)
    assert verdict.first_right == pytest.approx(found.accept_length(1) - 1) and 0 < verdict.first_right < 1
    assert verdict.metrics()["first_right"] == verdict.first_right


def test_tokens_per_second_are_those_of_the_best_number_of_drafts() -> None:
    found = drafted(0.5, 50, 0)
    flat = Speed({1: 0.01, 64: 0.01}, {}, {1: 1.0})
    assert flat.tokens_per_second(found) == pytest.approx(found.accept_length(3) / 0.01)
    steep = Speed({1: 0.01, 64: 0.64}, {}, {1: 1.0})
    assert steep.tokens_per_second(found) == pytest.approx(1 / 0.01)
    each_as_long = [0.001, 0.002, 0.003]
    mixed = Speed({1: 0.01, 64: 0.01}, {1: each_as_long}, {1: 0.5, 8: 0.5})
    best = max(found.accept_length(d) / (0.01 + d * 0.001) for d in range(4))
    assert mixed.tokens_per_second(found) == pytest.approx(4.5 * best)
    dear = [1.0, 1.0, 1.0]
    known = Speed({1: 0.01, 64: 0.01}, {1: each_as_long, 4: dear}, {8: 1.0})
    assert known.tokens_per_second(found) == pytest.approx(8 / 0.01), "as long as with four streams: not worth it"


def test_a_head_that_would_not_serve_faster_does_not_pass() -> None:
    """Better at three draft tokens, but where it serves only one is worth verifying, and there it is worse."""
    rng = np.random.default_rng(0)
    tokens = np.full(80, 100)
    noise = rng.integers(0, 3, 80)
    live = Score(tokens, np.stack((tokens, 60 + noise, 60 + noise, 60 + noise), 1))
    candidate = Score(tokens, np.stack((tokens, 65 + noise, 55 + noise, 50 + noise), 1))
    assert judge(candidate, live).passes
    busy = Speed({1: 0.01, 2: 0.011, 3: 0.05, 64: 1.0}, {}, {1: 1.0})
    verdict = judge(candidate, live, busy)
    assert not verdict.passes and verdict.speedup < 1


def test_the_same_text_many_times_is_no_proof() -> None:
    """Better on one text in ten by far, and a little worse on the others; that one was asked again and again."""
    tokens = np.full(200, 100)
    live = Score(tokens, np.repeat(np.array([[100, 60, 60, 60]]), 200, 0))
    candidate = Score(tokens, np.where(np.arange(200)[:, None] < 150, [[100, 30, 30, 30]], [[100, 61, 61, 61]]))
    alone = np.arange(200)
    assert judge(candidate, live, groups=alone).passes
    once = np.maximum(np.arange(200), 149)  # the first 150 are one
    assert not judge(candidate, live, groups=np.where(np.arange(200) < 150, 0, once)).passes


def test_too_few_different_texts_are_named() -> None:
    better, worse = drafted(0.7, 70, 0), drafted(0.3, 70, 1)
    assert judge(better, worse, groups=np.arange(70) % 8).passes
    verdict = judge(better, worse, groups=np.arange(70) % 7, repeated=0.9)
    assert not verdict.passes and (verdict.texts, verdict.different) == (70, 7)
    assert verdict.describe().endswith(
        "70 texts, 7 of them different, 90% asked before; a verdict needs 8 different ones"
    )
    assert verdict.metrics()["different_texts"] == 7 and verdict.metrics()["repeated"] == 0.9


@given(st.integers(1, 5), st.integers(1, 6))
def test_weights_are_how_often_a_text_counts(first: int, second: int) -> None:
    one, other = drafted(0.6, 1, 0), drafted(0.3, 1, 1)
    both = Score(np.concatenate((one.tokens, other.tokens)), np.concatenate((one.steps, other.steps)))
    parts = [one] * first + [other] * second
    repeated = Score(np.concatenate([p.tokens for p in parts]), np.concatenate([p.steps for p in parts]))
    weighted = both.weighted(np.array([first, second]) / 7)
    for depth in range(4):
        assert weighted.accept_length(depth) == pytest.approx(repeated.accept_length(depth))
    assert weighted.without_drafting().accept_length(3) == 1
