import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.scheduling import queue_order
from slipstream.engine.scheduling.queue_order import QueueOrder
from slipstream.engine.scheduling.step_cost import StepCost

CONFIG = EngineConfig()


def order() -> QueueOrder:
    return QueueOrder(CONFIG, StepCost(), clock=lambda: 100.0)


def request(prompt=(1, 2, 3), max_tokens=500, **fields) -> NewRequest:
    given = {"longest_first": True, "arrival": 100.0} | fields
    return NewRequest(request_id=1, prompt=list(prompt), params=SamplingParams(max_tokens=max_tokens), **given)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(-3, 3))
def test_longer_answers_go_first_by_less_than_a_level(one, other, priority):
    fields = {"max_tokens": 10**6, "priority": priority}
    short, long = sorted((one or 10**6, other or 10**6))
    first = order().deadline(request(expected_tokens=long, **fields))
    last = order().deadline(request(expected_tokens=short, **fields))
    assert first <= last
    assert last - first < CONFIG.priority_step_s
    urgent = order().deadline(request(**fields | {"priority": priority - 1, "longest_first": False}))
    assert urgent <= first


def test_who_does_not_ask_for_it_is_served_by_arrival():
    found = order()
    found.ended(request(), 400)
    plain = [found.deadline(request(longest_first=False, expected_tokens=each)) for each in (0, 10, 10_000)]
    assert len(set(plain)) == 1


def test_the_length_of_earlier_answers_counts_then_the_most_that_may_come():
    found = order()
    assert found.expected_tokens(request(max_tokens=70)) == 70
    found.ended(request(), 40)
    found.ended(request(), 20)
    assert found.expected_tokens(request()) == 30
    assert found.expected_tokens(request(max_tokens=10)) == 10
    assert found.expected_tokens(request(expected_tokens=300)) == 300
    assert found.expected_tokens(request((1, 2, 4))) == 500


def test_tenants_do_not_learn_from_each_other():
    found = order()
    found.ended(request(tenant="a"), 40)
    assert found.expected_tokens(request(tenant="a")) == 40
    assert found.expected_tokens(request(tenant="b")) == 500
    assert found.expected_tokens(request()) == 500


def test_what_is_remembered_is_bounded_and_the_least_recent_goes(monkeypatch):
    monkeypatch.setattr(queue_order, "REMEMBERED_PROMPTS", 2)
    found = order()
    for prompt in ((1,), (2,), (1,), (3,)):
        found.ended(request(prompt), 40)
    assert [found.expected_tokens(request(prompt)) for prompt in ((1,), (2,), (3,))] == [40, 500, 40]


def test_plain_requests_leave_no_trace():
    found = order()
    found.ended(request(longest_first=False), 40)
    assert found.expected_tokens(request()) == pytest.approx(500)
