"""What is said of a machine before and after a demo."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.loadtest.demo.machine import break_even, hope, verdict

MACHINE = {"step_seconds": {"1": 0.020, "2": 0.021, "8": 0.033}, "draft_seconds": {"1": [0.002, 0.0025, 0.003]}}


def test_a_chain_pays_where_it_brings_more_tokens_than_its_step_costs_plain_ones():
    assert break_even(MACHINE) == pytest.approx((0.025 + 0.003) / 0.020)
    assert break_even(None) is None and break_even({"step_seconds": {}, "draft_seconds": {}}) is None
    assert break_even(MACHINE | {"draft_seconds": {}}) is None, "no head has drafted yet"


def test_what_can_be_hoped_for():
    said = hope(MACHINE, "float32, 134 GFLOP/s")
    assert "1.40 times a plain one" in said and "training computes in float32, 134 GFLOP/s" in said
    assert hope(None, "") == ""
    assert hope(None, "bfloat16, 700 GFLOP/s") == "training computes in bfloat16, 700 GFLOP/s"


@pytest.mark.parametrize(
    ("accept_length", "speedup", "words"),
    [
        (1.95, 1.40, ["It pays here: 1.40 times", "1.95 tokens per step", "more than the 1.40"]),
        (1.20, 1.00, ["as fast as without", "1.20 tokens per step", "less than the 1.40"]),
        (1.20, 0.95, ["It does not pay here: 0.95 times", "less than the 1.40"]),
    ],
)
def test_whether_it_paid_and_why(accept_length, speedup, words):
    said = verdict(MACHINE, accept_length, speedup)
    assert all(each in said for each in words), said


@given(st.floats(0.01, 10), st.floats(1, 4), st.sampled_from([None, MACHINE]))
def test_it_pays_only_if_it_is_faster(speedup, accept_length, machine):
    said = verdict(machine, accept_length, speedup)
    assert said.startswith("It pays here") == (speedup >= 1.02) and said.endswith(".")
