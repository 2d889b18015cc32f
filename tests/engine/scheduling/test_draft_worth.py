"""What is known of whether drafting pays."""

from __future__ import annotations

from slipstream.engine.scheduling.draft_worth import Worth, WorthByLoad


def test_what_asking_takes_counts_as_long_as_it_takes() -> None:
    """Drafters read whole prompts when they are asked for the first time."""
    once, often, short = Worth(16), Worth(16), Worth(16)
    for worth in (once, often, short):
        for step in range(100):
            worth.observe(step, 1.2, 1.0, 8)
    once.observe(1, 9.0, 10.0, 8)
    for step in range(5):
        often.observe(step, 1.8, 2.0, 8)
    short.observe(1, 1.8, 2.0, 8)
    assert abs(once.ratio - often.ratio) < 0.02
    assert once.ratio < short.ratio - 0.02


def test_versions_that_follow_one_another_are_tried_as_often_as_trying_is_cheap() -> None:
    """Each is tried at once, unless the one before was tried a moment ago, and in vain."""
    worth = Worth(512)
    for step in range(100):
        worth.observe(step, 0.9, 1.0, 8)
    worth.retry()
    assert worth.next_probe <= 100, "nothing was spent"
    worth.spend(4.0)
    worth.observe(1000, 0.9, 1.0, 8)
    worth.retry()
    assert 1000 + 350 < worth.next_probe < 1000 + 450, "a hundredth of the time"


def test_beside_others_drafting_has_to_bring_more() -> None:
    """Who gets more tokens than others ends earlier, and steps for those that are left take as long."""
    worths = WorthByLoad()
    assert not any(worths.of(requests).is_paused for requests in (1, 8, 100)), "hope comes first"
    for step in range(300):
        for requests in (1, 8):
            worths.of(requests).observe(step, 1.03, 1.0, requests)
    assert not worths.of(1).is_paused and worths.of(8).is_paused
    for step in range(300):
        worths.of(8).observe(step, 1.07, 1.0, 8)
    assert not worths.of(8).is_paused
