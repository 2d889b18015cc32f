"""What a principal may take: per minute, and at a time; and that the queue is nobody's alone."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.access.account import Account, UsageLimits
from slipstream.server.access.admission import Admission
from slipstream.server.errors import InvalidRequestError, OverloadedError, RateLimitedError
from slipstream.server.telemetry.metrics import Metrics


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def headers(account: Account) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in account.headers()}


def refusal(call: Any, *arguments: Any) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        call(*arguments)
    assert caught.value.status == 429 and caught.value.retry_after_s is not None
    return caught.value


@given(limit=st.integers(1, 600), waits=st.lists(st.floats(0, 20), max_size=60))
def test_no_more_requests_are_let_in_than_the_limit_and_what_has_come_back(limit: int, waits: list[float]) -> None:
    clock = Clock()
    account = Account(UsageLimits(requests_per_minute=limit), clock)
    taken, began = 0, clock.now
    for wait in waits:
        clock.now += wait
        for _ in range(limit):
            try:
                account.begin_request()
            except RateLimitedError as error:
                assert error.reason == "requests_per_minute"
                clock.now += error.retry_after_s or 0
                account.begin_request()  # whoever waits as long as he is told is let in
            taken += 1
            assert taken <= limit + (clock.now - began) * limit / 60 + 1e-6
            assert 0 <= int(headers(account)["x-ratelimit-remaining-requests"]) < limit


def test_tokens_count_while_they_come_and_may_be_overdrawn() -> None:
    clock = Clock()
    account = Account(UsageLimits(tokens_per_minute=60), clock)
    generated = 0
    account.begin_request()
    with account.holding(1, 20, lambda: generated):
        assert headers(account)["x-ratelimit-remaining-tokens"] == "40"
        generated = 39
        account.begin_request()
        generated = 70
        assert refusal(account.begin_request).retry_after_s == 31
        assert headers(account)["x-ratelimit-remaining-tokens"] == "0"
    assert refusal(account.begin_request).retry_after_s == 31
    clock.now += 31
    account.begin_request()
    clock.now += 1000
    assert headers(account) == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_changed_limits_forget_nothing() -> None:
    clock = Clock()
    account = Account(UsageLimits(requests_per_minute=3), clock)
    for _ in range(3):
        account.begin_request()
    account.change(UsageLimits(requests_per_minute=5))
    account.begin_request()
    account.begin_request()
    refusal(account.begin_request)
    account.change(UsageLimits())
    account.begin_request()
    assert headers(account) == {}


def test_what_was_taken_without_a_limit_counts_for_none() -> None:
    """The limits of a key can change while it is used, in its file."""
    clock = Clock()
    account = Account(UsageLimits(), clock)
    with account.holding(1, 10_000, lambda: 5_000):
        account.begin_request()
    for _ in range(2):
        account.change(UsageLimits(requests_per_minute=2, tokens_per_minute=100))
        found = headers(account)
        assert (found["x-ratelimit-remaining-requests"], found["x-ratelimit-remaining-tokens"]) == ("2", "100")
        account.begin_request()
        with account.holding(1, 100, lambda: 500):
            pass
        account.change(UsageLimits())


def test_a_request_that_is_refused_for_its_tokens_counts_as_none() -> None:
    clock = Clock()
    account = Account(UsageLimits(requests_per_minute=3, tokens_per_minute=60), clock)
    account.begin_request()
    with account.holding(1, 60, lambda: 0):
        for _ in range(3):
            assert refusal(account.begin_request).reason == "tokens_per_minute"
    assert headers(account)["x-ratelimit-remaining-requests"] == "2"


@given(seconds=st.floats(0, 100_000))
def test_times_are_written_as_openai_does(seconds: float) -> None:
    clock = Clock()
    account = Account(UsageLimits(requests_per_minute=1), clock)
    account._requests.take(seconds / 60)
    text = headers(account)["x-ratelimit-reset-requests"]
    found = re.fullmatch(r"(\d+)ms|(?:(\d+)m)?([\d.]+)s", text)
    assert found is not None, text
    told = int(found[1]) / 1000 if found[1] else int(found[2] or 0) * 60 + float(found[3])
    assert seconds - 0.01 <= told <= seconds + 0.2


class Waiting:
    def __init__(self, tokens: int = 1) -> None:
        self.prompt = [0] * tokens
        self.has_begun = False
        self.num_tokens = 0


class Queue:
    """Admission, with everything that was let in."""

    def __init__(self, most: int, most_tokens: int = 0) -> None:
        self.clock = Clock()
        self.open: dict[Account, list[ExitStack]] = {}
        self.metrics = Metrics("tiny")
        self.admission = Admission(most, most_tokens, lambda: self.held(), self.metrics, self.clock)

    def held(self, account: Account | None = None) -> int:
        return sum(len(stacks) for holder, stacks in self.open.items() if account in (None, holder))

    def enter(self, account: Account, tokens: int = 1) -> bool:
        try:
            self.admission.require_room(account, 1, tokens)
        except OverloadedError as error:
            assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 60
            return False
        stack = ExitStack()
        stack.enter_context(self.admission.holding(account, [Waiting(tokens)], tokens))
        self.open.setdefault(account, []).append(stack)
        return True

    def leave(self, account: Account) -> None:
        if self.open.get(account):
            self.open[account].pop(0).close()


@given(
    most=st.integers(2, 20),
    moves=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=120),
)
def test_nobody_fills_the_queue_for_others(most: int, moves: list[tuple[int, bool]]) -> None:
    queue, accounts = Queue(most), [Account() for _ in range(4)]
    for number, comes in moves:
        account = accounts[number]
        if not comes:
            queue.leave(account)
            continue
        active = len({holder for holder in accounts if queue.held(holder)} | {account})
        whole, own = queue.held(), queue.held(account)
        let_in = queue.enter(account)
        if whole < most or own + 1 <= most / active:
            assert let_in, "there was room, or he had less than his share"
        elif own >= most:
            assert not let_in
        assert queue.held() <= most * (1 + 1 / 2 + 1 / 3 + 1 / 4)
    for account in accounts:
        while queue.held(account):
            queue.leave(account)
    assert not queue.admission._held


def test_for_one_alone_the_bound_is_exact() -> None:
    queue, account = Queue(3), Account()
    assert [queue.enter(account) for _ in range(5)] == [True, True, True, False, False]


def test_tokens_that_wait_are_bounded_and_shared() -> None:
    queue, flood, quiet = Queue(100, 50), Account(), Account()
    assert queue.enter(flood, 200), "a prompt that is longer than the bound waits alone"
    assert not queue.enter(flood, 1)
    assert queue.enter(quiet, 20)
    assert not queue.enter(quiet, 10), "which would be more than half"
    queue.leave(flood)
    assert queue.enter(quiet, 10)


def test_retry_after_reflects_how_fast_the_queue_moves() -> None:
    queue, account = Queue(4), Account()
    for _ in range(4):
        queue.enter(account)
    found: list[int] = []
    for each in (0.1, 2.0, 30.0):
        for _ in range(64):
            queue.clock.now += each
            queue.leave(account)
            assert queue.enter(account)
        found.append(queue.admission.seconds_until_room(3))
    assert found == [1, 6, 60]


def test_what_one_key_may_have_at_a_time() -> None:
    queue, account = Queue(10), Account(UsageLimits(max_concurrent=2))
    assert [queue.enter(account) for _ in range(3)] == [True, True, False]
    assert queue.enter(Account())
    with pytest.raises(InvalidRequestError, match="max_concurrent"):
        queue.admission.require_room(account, 3)
    with pytest.raises(InvalidRequestError, match="--max-queued-requests"):
        queue.admission.require_room(Account(), 11)
    said = queue.metrics.render()[0].decode()
    assert re.search(r'admission_rejections_total\{model_name="tiny",reason="max_concurrent"\} 1\.0', said)
