import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slipstream.kernels import ops, random
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton import launch

NEVER = float("-inf")
REFERENCE = ReferenceOps()
BACKENDS = [*ops.backend_names(), *(["triton"] if launch.runs_on("cpu") else [])]


def columns(rows: int, t: float, k: int, m: float, p: float) -> tuple[torch.Tensor, ...]:
    return (
        torch.full((rows,), t),
        torch.full((rows,), k, dtype=torch.int32),
        torch.full((rows,), m),
        torch.full((rows,), p),
    )


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123's philox4x32-10."""
    zero = np.zeros(1, np.uint64)
    assert [int(word[0]) for word in random.philox(zero, zero, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniforms_depend_on_key_counter_and_stream_only() -> None:
    keys = np.arange(1000, dtype=np.uint64)
    counters = np.arange(1000, dtype=np.uint64) * 7
    together = random.uniform(keys, counters)
    assert (together >= 0).all() and (together < 1).all() and len(set(together)) == 1000
    alone = [random.uniform(keys[i : i + 1], counters[i : i + 1])[0] for i in range(0, 1000, 50)]
    assert np.array_equal(alone, together[::50])
    assert not np.array_equal(random.uniform(keys, counters, stream=1), together)
    assert abs(together.mean() - 0.5) < 0.03


@settings(max_examples=60)
@given(
    vocab=st.integers(1, 200),
    rows=st.integers(1, 5),
    scale=st.sampled_from([0.5, 3.0, 20.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 500]),
    min_p=st.sampled_from([0.0, 0.01, 0.3]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    masked=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@example(vocab=94, rows=2, scale=20.0, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0, masked=0, seed=0).via(
    "a token of probability 1.5e-38"
)
def test_distribution_keeps_what_the_definition_keeps(
    isa: str,
    vocab: int,
    rows: int,
    scale: float,
    temperature: float,
    top_k: int,
    min_p: float,
    top_p: float,
    masked: int,
    seed: int,
) -> None:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    logits[:, 1 : 1 + masked] = NEVER
    parameters = columns(rows, temperature, top_k, min_p, top_p)
    weights = ops.distribution(logits.clone(), *parameters)
    expected = REFERENCE.distribution(logits.clone(), *parameters)
    probs, expected = weights / weights.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True)
    for row in range(rows):
        # The compiled exponential is zero below e^-87, which is 1.6e-38.
        kept, wanted = probs[row] > 2e-38, expected[row] > 2e-38
        if not torch.equal(kept, wanted):
            # Only a token on the border of the nucleus may differ, by the rounding of its running sum.
            assert top_p < 1 and (kept ^ wanted).sum() <= 1 and float(expected[row].max()) < 1
            continue
        assert torch.allclose(probs[row], expected[row], atol=1e-6)


def exact_weights(logits: torch.Tensor, t: float, k: int, m: float, p: float) -> torch.Tensor:
    """The definition in float64, for one row; a temperature of 0 is the limit, which its largest logits share."""
    x = logits.double()
    order = x.unique().flip(0)
    if k:
        x = x.masked_fill(x < x.sort(descending=True).values[min(k, len(x)) - 1], NEVER)
    below = x - order[0]
    weights = (below / t).exp() if t else (below == 0).double()
    weights[below == 0] = 1.0
    weights[weights < m] = 0.0
    if p < 1:
        ranked = weights.sort(descending=True).values
        nucleus = ranked[min(int((ranked.cumsum(0) < ranked.sum() * p).sum()), len(ranked) - 1)]
        weights[weights < nucleus] = 0.0
    return weights / weights.sum()


tiny = st.sampled_from([0.0, 5e-324, 1e-310, 1e-46, 1e-45, 1e-42, 1.1754942e-38, 1.2e-38, 1e-30, 1e-7])
nearly_one = st.sampled_from([1.0, 1 - 2**-24, 1 - 2**-53])


@settings(max_examples=80)
@given(
    logits=st.lists(st.sampled_from([0.0, -0.0, 1e-3, -30.0, 7.5, 88.0, -1e30, 1e30, NEVER]), min_size=1, max_size=40),
    t=tiny | st.sampled_from([1e-3, 1.0, 2.0]),
    k=st.sampled_from([0, 1, 3, 2**31 - 1]),
    m=tiny | nearly_one,
    p=tiny | nearly_one,
)
def test_extreme_parameters_give_what_float64_gives(
    isa: str, logits: list[float], t: float, k: int, m: float, p: float
) -> None:
    row = torch.tensor([[*logits, 3.0]])
    expected = exact_weights(row[0], t, k, m, p)
    both = row.repeat(2, 1)
    for rows in (both.clone(), both.t().contiguous().t()):  # not contiguous: the reference
        found = ops.distribution(rows, *columns(2, t, k, m, p))
        probs = found[0].double() / found[0].double().sum()
        assert torch.allclose(probs, expected, atol=1e-6), (probs, expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_at_the_border_stay(isa: str, top_k: int) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    for backend in BACKENDS:
        with ops.use_backend(backend):
            weights = ops.distribution(logits.clone(), *columns(1, 1.0, top_k, 0.0, 1.0))
        assert (weights[0] > 0).tolist() == [False, True, True, False, True]


@given(vocab=st.integers(1, 100), seed=st.integers(0, 500), share=st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_running_sum(isa: str, vocab: int, seed: int, share: float) -> None:
    weights = torch.rand(1, vocab, generator=torch.Generator().manual_seed(seed)) + 1e-3
    weights[0, seed % vocab :: 3] = 0.0
    weights[0, (seed + 1) % vocab] = 0.5
    shares = torch.tensor([share], dtype=torch.float64)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            drawn = int(ops.draw(weights, shares))
        assert weights[0, drawn] > 0
        below, upto = float(weights[0, :drawn].double().sum()), float(weights[0, : drawn + 1].double().sum())
        target = share * float(weights[0].double().sum())
        assert below <= target * (1 + 1e-6) + 1e-9 and upto >= target * (1 - 1e-6) - 1e-9


def test_drawn_tokens_follow_the_weights(isa: str) -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.5, 1.5] * 5])
    count = 60_000
    shares = torch.from_numpy(random.uniform(np.full(count, 5, np.uint64), np.arange(count, dtype=np.uint64)))
    drawn = ops.draw(weights.expand(count, -1).contiguous(), shares)
    observed = torch.bincount(drawn, minlength=30).double()
    expected = weights[0].double() / weights.sum() * count
    assert observed[expected == 0].sum() == 0
    positive = expected > 0
    chi_square = ((observed - expected)[positive] ** 2 / expected[positive]).sum()
    assert chi_square < 24 + 5 * 48**0.5  # 24 degrees of freedom, five standard deviations


def test_argmax_takes_the_first_largest_and_refuses_broken_rows(isa: str) -> None:
    logits = torch.randn(6, 1001)
    logits[1, [700, 900]] = 9.0
    logits[2, 5] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = NEVER
    logits[5, :1000] = NEVER
    expected = REFERENCE.argmax(logits)
    assert expected.tolist()[1:] == [700, -1, -1, -1, 1000]
    for backend in BACKENDS:
        with ops.use_backend(backend):
            assert ops.argmax(logits).tolist() == expected.tolist()
            best, likely = ops.argmax_with_probability(logits)
        assert best.tolist() == expected.tolist()
        assert likely[2:].tolist() == [0.0, 0.0, 0.0, 1.0]
        for row in (0, 1):
            assert likely[row] == pytest.approx(float(logits[row].double().softmax(-1).max()), rel=1e-5)


def test_penalties_follow_their_definition() -> None:
    for backend in BACKENDS:
        logits = torch.tensor([[2.0, -2.0, 1.0, 1.0]])
        output, counts = torch.tensor([1, 3]), torch.tensor([1.0, 3.0])
        with ops.use_backend(backend):
            ops.penalize(logits, 0, torch.tensor([0, 1]), 2.0, output, counts, 0.5, 0.25)
        assert logits[0].tolist() == [1.0, -4.0 - 0.75, 1.0, 1.0 - 1.75]
