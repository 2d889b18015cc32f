"""Samples that end together: by enough whole answers, and by a caller's scores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.rollout.groups import Groups

NAME = ("tenant", "group")


def groups() -> tuple[Groups, list[int]]:
    aborted: list[int] = []
    return Groups(lambda ids: aborted.extend(ids)), aborted


@given(st.integers(1, 8), st.integers(0, 9), st.randoms(use_true_random=False))
def test_once_enough_are_whole_the_others_are_aborted(count: int, enough: int, random: Any) -> None:
    found, aborted = groups()
    members = {f"r-{index}": index for index in range(count)}
    with found.joined(NAME, enough, members) as ended:
        order = random.sample(sorted(members), count)
        for done, member in enumerate(order, 1):
            if members[member] in aborted:
                continue
            ended(member)
            assert (len(aborted) == count - done) if enough and done >= enough else not aborted
    assert not found._groups


def test_requests_of_one_group_count_together_and_who_comes_late_is_ended() -> None:
    found, aborted = groups()
    with ExitStack() as stack:
        first = stack.enter_context(found.joined(NAME, 2, {"a-0": 1, "a-1": 2}))
        second = stack.enter_context(found.joined(NAME, 2, {"b-0": 3}))
        stack.enter_context(found.joined(("other", "group"), 2, {"c-0": 4}))
        first("a-0")
        second("b-0")
        assert aborted == [2]
        stack.enter_context(found.joined(NAME, 2, {"d-0": 5}))
        assert aborted == [2, 5]
        second("b-0")  # said twice
    with found.joined(NAME, 2, {"e-0": 6}):
        assert aborted == [2, 5], "the group has begun anew"


def test_the_best_go_on() -> None:
    found, aborted = groups()
    scores = {"a-0": 0.1, "a-1": 0.9, "a-2": 0.5, "a-3": 0.5, "stranger": 2.0}
    with found.joined(NAME, 0, {f"a-{index}": index for index in range(5)}) as ended:
        assert found.prune(("another", "group"), scores, 0) == []
        ended("a-0")
        assert found.prune(NAME, scores, 3) == ["a-3"]
        assert found.prune(NAME, scores, 3) == []
        assert aborted == [3]
        assert sorted(found.prune(NAME, scores, 0)) == ["a-1", "a-2"]


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any]) -> Any:
    return start_local()


def test_a_request_ends_with_enough_of_its_samples(server: Any) -> None:
    """The first whole answers are those of a few tokens; the others would take long."""
    body = {"prompt": "Once upon a time", "n": 4, "temperature": 1.0, "seed": 1, "ignore_eos": True, "max_tokens": 3000}
    stop = {"stop_token_ids": list(range(300)), "min_tokens": 2}
    status, found = server.post("/v1/completions", {**body, **stop, "rollout": {"enough": 2}})
    assert status == 200, found
    reasons = [choice["finish_reason"] for choice in found["choices"]]
    assert reasons.count("abort") <= 2
    assert len(reasons) - reasons.count("abort") >= 2
    server.wait_until_idle()


def test_requests_of_a_group_are_pruned_by_their_scores(server: Any) -> None:
    body = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 3000, "temperature": 0}

    def ask(name: str) -> dict[str, Any]:
        asked = {**body, "request_id": name, "rollout": {"group": "g"}}
        found: dict[str, Any]
        status, found = server.post("/v1/completions", asked)
        assert status == 200, found
        return found

    with ThreadPoolExecutor() as pool, server.suspended():
        asked = {name: pool.submit(ask, name) for name in ("one", "two")}
        pruned: set[str] = set()
        while len(pruned) < 2:
            assert not any(future.done() for future in asked.values())
            scores = {"one-0": 1.0, "two-0": 2.0}
            status, found = server.post("/v1/rollouts/prune", {"group": "g", "scores": scores, "keep": 0})
            assert status == 200, found
            pruned |= set(found["pruned"])
    for name in ("one", "two"):
        [choice] = asked[name].result()["choices"]
        assert choice["finish_reason"] == "abort"
    server.wait_until_idle()


def test_many_scores_are_read_where_they_hold_nobody_up(server: Any) -> None:
    scores = {f"request-of-some-trainer-{number}-0": number / 7 for number in range(60_000)}
    status, found = server.post("/v1/rollouts/prune", {"group": "nobody", "scores": scores, "keep": 1})
    assert (status, found) == (200, {"pruned": []})
    status, found = server.post("/v1/rollouts/prune", {"group": "nobody", "scores": scores, "keep": -1})
    assert status == 400 and found["error"]["param"] == "keep"


@pytest.mark.parametrize(
    "rollout", [{"enough": 0}, {"group": ""}, {"expected_tokens": -1}, {"unknown": 1}, [], {"enough": 1.5}]
)
def test_what_a_rollout_cannot_be_is_refused(server: Any, rollout: Any) -> None:
    status, found = server.post("/v1/completions", {"prompt": "x", "rollout": rollout})
    assert status == 400 and "rollout" in found["error"]["message"]
