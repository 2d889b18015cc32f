import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.plan import StepWork
from slipstream.engine.scheduling.step_cost import TOGETHER, StepCost


def machine(work: StepWork) -> float:
    """A machine that is bound by memory up to 12 tokens and by arithmetic beyond."""
    return 0.006 + max(work.tokens - 12, 0) * 0.00025 + work.reads * 1e-6 + work.pairs * 1e-7


def steps(segments: int, tokens: int, end: int) -> StepWork:
    work = StepWork()
    for _ in range(segments):
        work = work.add(end - tokens, tokens)
    return work


def calibrated() -> StepCost:
    cost = StepCost()
    profile = [steps(1, n, n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    probes = [steps(1, 16, 1024), steps(16, 1, 1024)]
    cost.calibrate([(work, machine(work)) for work in profile], [(work, machine(work)) for work in probes])
    return cost


def test_work_counts_positions_reads_and_pairs() -> None:
    work = StepWork().add(10, 3).add(0, 2)
    assert work == StepWork(5, 13 + 2, 11 + 12 + 13 + 1 + 2)


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 64, 200, 256])
def test_calibration_reproduces_the_machine(tokens: int) -> None:
    for work in (StepWork(tokens), steps(1, tokens, 2000), steps(tokens, 1, 500)):
        assert calibrated().predict(work) == pytest.approx(machine(work), rel=0.05)


def test_beyond_the_profile_the_curve_goes_on() -> None:
    for work in (steps(1, 1024, 1024), steps(1, 16, 4000)):
        assert calibrated().predict(work) == pytest.approx(machine(work), rel=0.05)


def test_it_learns_a_machine_that_changed() -> None:
    cost = calibrated()
    rng = np.random.default_rng(0)
    for _ in range(300):
        work = StepWork()
        for _ in range(int(rng.choice([1, 2, 3, 5, 8]))):
            count = int(rng.choice([1, 1, 4, 30]))
            work = work.add(int(rng.integers(1, 2000)), count)
        cost.observe(work, 2 * machine(work) * rng.uniform(0.9, 1.1))
    cases = [steps(segments, count, end) for segments in (2, 8) for count in (1, 4) for end in (100, 1500)]
    assert max(abs(cost.predict(work) / (2 * machine(work)) - 1) for work in cases) < 0.1


def test_sizes_not_seen_follow_the_machine() -> None:
    """Else a policy that always verifies would believe for ever that doing without is as slow as it once was."""
    cost = calibrated()
    before = cost.predict(StepWork(1))
    for _ in range(100):
        cost.observe(StepWork(4), 0.6 * machine(StepWork(4)))
    assert cost.predict(StepWork(1)) == pytest.approx(0.6 * before, rel=0.15)


@pytest.mark.parametrize("tokens", [1, 2, 4, 16])
def test_an_interrupted_measurement_at_the_start_does_not_last(tokens: int) -> None:
    """Else a policy that always verifies because of it would never find out what steps without draft tokens take."""
    cost = StepCost()
    profile = [(work, machine(work)) for work in (steps(1, n, n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256))]
    profile = [(work, seconds * 20 if work.tokens == tokens else seconds) for work, seconds in profile]
    probes = [steps(1, 16, 1024), steps(16, 1, 1024)]
    cost.calibrate(profile, [(work, machine(work)) for work in probes])
    for work in (steps(1, n, n) for n in (1, 2, 4, 8)):
        assert cost.predict(work) == pytest.approx(machine(work), rel=0.05)


@given(
    observed=st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from((1, 2, 4, 30)), st.floats(0.2, 5.0)), min_size=1, max_size=60
    )
)
def test_fewer_tokens_never_take_longer(observed: list[tuple[int, int, float]]) -> None:
    cost = calibrated()
    for segments, count, factor in observed:
        work = steps(segments, count, 200)
        cost.observe(work, factor * machine(work))
        times = list(cost.table().values())
        assert times == sorted(times)


def test_where_all_steps_verify_it_is_learned_that_plain_ones_are_faster_too() -> None:
    cost = calibrated()
    for _ in range(100):
        work = steps(1, 4, 300)
        cost.observe(work, machine(work) / 3)
    assert cost.predict(steps(1, 1, 300)) <= cost.predict(steps(1, 4, 300))


def test_one_slow_step_changes_little() -> None:
    cost = calibrated()
    for tokens in (8, 9, 7, 8) * 20:
        cost.observe(StepWork(tokens), machine(StepWork(tokens)))
    before = cost.predict(StepWork(8))
    cost.observe(StepWork(8), 10.0)
    cost.observe(StepWork(9), machine(StepWork(9)))
    assert before < cost.predict(StepWork(8)) < before * 1.06


def test_steps_of_one_size_are_learned_from_together_as_if_one_by_one() -> None:
    together, apart, sizes = calibrated(), calibrated(), (8, 9, 16, 3) * 4
    for tokens in sizes:
        for _ in range(TOGETHER):
            together.observe(StepWork(tokens), 1.3 * machine(StepWork(tokens)))
    for tokens in sizes * TOGETHER:
        apart.observe(StepWork(tokens), 1.3 * machine(StepWork(tokens)))
    for tokens in (1, *sizes[:4], 30):
        assert together.predict(StepWork(tokens)) == pytest.approx(apart.predict(StepWork(tokens)), rel=0.03)


@given(
    seconds=st.floats(0, 0.2),
    work=st.builds(StepWork, st.integers(0, 64), st.integers(0, 100_000), st.integers(0, 100_000)),
    begin=st.integers(0, 4000),
    most=st.integers(0, 512),
)
def test_the_chunk_is_the_largest_that_fits(seconds: float, work: StepWork, begin: int, most: int) -> None:
    cost = calibrated()
    chunk = cost.chunk_within(seconds, work, begin, most)
    assert 0 <= chunk <= most
    if chunk:
        assert cost.predict(work.add(begin, chunk)) <= seconds
    if chunk < most:
        assert cost.predict(work.add(begin, chunk + 1)) > seconds


@given(
    work=st.builds(StepWork, st.integers(1, 64), st.integers(0, 100_000), st.integers(0, 100_000)),
    most=st.integers(0, 100),
    start=st.integers(0, 4000),
)
def test_predictions_of_growing_steps_agree_with_single_ones(work: StepWork, most: int, start: int) -> None:
    cost = calibrated()
    seconds = cost.predict_more(work, most, start)
    for more in range(most + 1):
        grown = StepWork(work.tokens + more, work.reads, work.pairs + more * start)
        assert seconds[more] == pytest.approx(cost.predict(grown))


def test_a_size_measured_as_nothing_is_learned_all_the_same() -> None:
    """Noise can make a probe's slope larger than a whole step of the profile, so that nothing is left for the knot."""
    profile = [(steps(1, n, n), 0.001) for n in (1, 2, 4, 8, 16)]
    probes = [(steps(1, 16, 1024), 3.0), (steps(16, 1, 1024), 9.0)]
    cost = StepCost()
    cost.calibrate(profile, probes)
    for _ in range(300):
        cost.observe(StepWork(4, 40, 100), 0.001)
    assert cost.predict(StepWork(4, 40, 100)) == pytest.approx(0.001, rel=0.2)
