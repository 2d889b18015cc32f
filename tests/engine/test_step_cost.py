import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.step_cost import StepCost, chunk_context


def machine(tokens: int, context: int) -> float:
    """A machine that is bound by memory up to 12 tokens and by arithmetic beyond."""
    return 0.006 + max(tokens - 12, 0) * 0.00025 + context * 2e-8


def calibrated() -> StepCost:
    cost = StepCost()
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    profile = [(n, chunk_context(0, n), machine(n, chunk_context(0, n))) for n in sizes]
    cost.calibrate(profile, (16, 16_000, machine(16, 16_000)))
    return cost


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 64, 200, 256])
def test_calibration_reproduces_the_machine(tokens: int) -> None:
    assert calibrated().predict(tokens, 0) == pytest.approx(machine(tokens, 0), rel=0.05)


def test_beyond_the_profile_the_curve_goes_on() -> None:
    assert calibrated().predict(1024, 0) == pytest.approx(machine(1024, 0), rel=0.05)
    assert calibrated().predict(16, 64_000) == pytest.approx(machine(16, 64_000), rel=0.05)


def test_it_learns_a_machine_that_changed() -> None:
    cost = calibrated()
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens = int(rng.choice([1, 2, 3, 5, 8, 16, 24, 48]))
        context = tokens * int(rng.integers(1, 2000))
        cost.observe(tokens, context, 2 * machine(tokens, context) * rng.uniform(0.9, 1.1))
    errors = [cost.predict(n, c) / (2 * machine(n, c)) - 1 for n in (2, 8, 24, 48) for c in (n * 100, n * 1500)]
    assert max(map(abs, errors)) < 0.1


def test_one_slow_step_changes_little() -> None:
    cost = calibrated()
    for tokens in (8, 9, 7, 8) * 20:
        cost.observe(tokens, 0, machine(tokens, 0))
    before = cost.predict(8, 0)
    cost.observe(8, 0, 10.0)
    assert cost.predict(8, 0) < before * 1.06


@given(
    seconds=st.floats(0, 0.2),
    tokens=st.integers(0, 64),
    context=st.integers(0, 100_000),
    begin=st.integers(0, 4000),
    most=st.integers(0, 512),
)
def test_the_chunk_is_the_largest_that_fits(seconds: float, tokens: int, context: int, begin: int, most: int) -> None:
    cost = calibrated()
    chunk = cost.chunk_within(seconds, tokens, context, begin, most)
    assert 0 <= chunk <= most

    def takes(count: int) -> float:
        return cost.predict(tokens + count, context + chunk_context(begin, count))

    if chunk:
        assert takes(chunk) <= seconds
    if chunk < most:
        assert takes(chunk + 1) > seconds


@given(st.integers(0, 1000), st.integers(0, 200))
def test_chunk_context_sums_the_positions_attended_to(begin: int, count: int) -> None:
    assert chunk_context(begin, count) == sum(begin + i + 1 for i in range(count))
