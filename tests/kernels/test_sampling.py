from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from slipstream.kernels import ops, random
from slipstream.kernels.reference import ReferenceOps
from slipstream.kernels.triton import launch

NEVER = ops.NEVER
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
    words = random.philox(zero, zero, 0, zero)
    assert [int(word[0]) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def noise(seeds: int, indices: int, ids: int) -> random.Float64:
    """[seeds * indices, ids]"""
    key, counter = np.divmod(np.arange(seeds * indices, dtype=np.uint64)[:, None], np.uint64(indices))
    return random.exponential(key, counter, np.arange(ids))


def test_noise_is_independent_and_exponential() -> None:
    found = noise(20, 50, 192)
    assert kstest(found.ravel(), "expon").pvalue > 1e-3
    blocks = found.reshape(-1, 3, 64)
    least = blocks.min(-1)
    assert kstest(64 * least.ravel(), "expon").pvalue > 1e-3
    # Which of a block's ids is the first falls to all alike, and what the others have above it is exponential, too.
    assert chisquare(np.bincount(blocks.argmin(-1).ravel(), minlength=64)).pvalue > 1e-3
    above = np.sort(blocks, axis=-1)[..., 1:] - least[..., None]
    assert kstest(above.ravel(), "expon").pvalue > 1e-3
    # Tokens far less likely than one in 2^32 have their chance.
    small = noise(1, 3_000, 1)[:, 0]
    assert abs((small < 0.01).mean() - 0.01) < 0.006
    correlations = np.corrcoef(np.concatenate([found[:, :6], found[:, 64:66], found[:, 16:17]], axis=1).T)
    assert abs(correlations - np.eye(9)).max() < 5 / len(found) ** 0.5


def test_noise_depends_on_seed_index_and_token_only() -> None:
    seeds = np.array([3, 2**64 - 1, 2**40], np.uint64)[:, None]
    indices = np.array([0, 7, 2**33], np.uint64)[:, None]
    together = random.exponential(seeds, indices, np.arange(300))
    for row in range(3):
        for token in (0, 63, 64, 299):
            alone = random.exponential(seeds[row], indices[row], np.array([token]))
            assert alone[0] == together[row, token]
    assert len(np.unique(together)) == together.size
    least, at = random.least(seeds, indices, np.arange(4))
    assert np.array_equal(together[:, :256].reshape(3, 4, 64).min(-1), least)
    assert np.array_equal(together[:, :256].reshape(3, 4, 64).argmin(-1), at)


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


@dataclass(frozen=True)
class Race:
    weights: torch.Tensor
    seeds: torch.Tensor
    indices: torch.Tensor
    ids: torch.Tensor | None

    def run(self, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.race(self.weights, self.seeds, self.indices, count, self.ids)

    def scores(self) -> torch.Tensor:
        """The definition, without any thought of what it costs."""
        ids = np.arange(self.weights.shape[1]) if self.ids is None else self.ids.numpy().astype(np.int64)
        key, counter = (column.numpy().view(np.uint64)[:, None] for column in (self.seeds, self.indices))
        return self.weights.double() / torch.from_numpy(random.exponential(key, counter, ids))


@st.composite
def races(draw: st.DrawFn, widest: int = 200) -> Race:
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, widest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    weights = (torch.randn(rows, n, generator=generator) * spread).clamp(max=60.0).exp()
    weights *= 2.0 ** draw(st.sampled_from([-30, 0, 8]))
    weights[torch.rand(rows, n, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.97, 1.0]))] = 0.0
    words = st.integers(-(2**63), 2**63 - 1)
    seeds, indices = (draw(st.lists(numbers, min_size=rows, max_size=rows)) for numbers in (words, words))
    ids = None
    if draw(st.booleans()):
        ids = torch.randperm(draw(st.sampled_from([n, 2 * n + 3, 5000 + n])), generator=generator)[:n].int()
        ids = ids.sort().values if draw(st.booleans()) else ids
    return Race(weights, torch.tensor(seeds), torch.tensor(indices), ids)


def assert_firsts(race: Race, places: torch.Tensor, scores: torch.Tensor, tolerance: float) -> None:
    """These are the first of the race, in order, up to ties."""
    exact = race.scores()
    count = places.shape[1]
    best = exact.sort(dim=-1, descending=True).values
    best = torch.nn.functional.pad(best, (0, max(count - best.shape[1], 0)))[:, :count]
    assert torch.equal(places >= 0, best > 0) and torch.equal(scores > 0, best > 0)
    mine = exact.gather(1, places.clamp(min=0)).masked_fill(places < 0, 0.0)
    torch.testing.assert_close(mine, best, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(scores.double(), best, rtol=max(tolerance, 1e-6), atol=0.0)
    for row in places.tolist():
        assert len(set(row) - {-1}) == len([place for place in row if place >= 0])


@settings(max_examples=40)
@given(race=races(), count=st.sampled_from([1, 2, 5]))
def test_the_first_of_a_race_are_those_of_its_definition(isa: str, race: Race, count: int) -> None:
    for backend in ops.backend_names():  # Triton's has a test of its own
        with ops.use_backend(backend):
            places, scores = race.run(count)
            assert_firsts(race, places, scores, 1e-12)
            alone = Race(race.weights[-1:], race.seeds[-1:], race.indices[-1:], race.ids).run(count)
            assert torch.equal(alone[0][0], places[-1]) and torch.equal(alone[1][0], scores[-1])
            if count == 1:
                drawn = ops.draw(race.weights, race.seeds, race.indices)
                assert race.ids is not None or torch.equal(drawn, places[:, 0])


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 8.0])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_race_of_a_whole_vocabulary_leaves_nobody_out(isa: str, spread: float, mapped: bool) -> None:
    """However weight is spread; most tokens are passed over without a look at their noise."""
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(2, 49_152 - 30, generator=generator) * spread).exp()
    weights /= weights.max(-1, keepdim=True).values
    ids = torch.randperm(60_000, generator=generator)[: weights.shape[1]].sort().values.int() if mapped else None
    race = Race(weights, torch.arange(2) * 12345, torch.arange(2), ids)
    for backend in ops.backend_names():
        with ops.use_backend(backend):
            for count in (1, 4):
                assert_firsts(race, *race.run(count), 1e-12)


@settings(max_examples=40)
@given(race=races(80), temperature=st.sampled_from([0.3, 1.0]), top_k=st.sampled_from([0, 1, 3, 20]), data=st.data())
def test_filters_take_part_of_the_field_away_and_the_others_stay_in_order(
    isa: str, race: Race, temperature: float, top_k: int, data: st.DataObject
) -> None:
    """So a draft token of a wider distribution is still right where the filter keeps it, and runners-up are winners."""
    min_p, top_p = data.draw(st.sampled_from([0.0, 0.1])), data.draw(st.sampled_from([0.5, 0.9, 1.0]))
    logits = race.weights.log().clamp(min=-60.0)
    rows = len(logits)
    every = replace(race, weights=ops.distribution(logits.clone(), *columns(rows, temperature, 0, 0.0, 1.0)))
    kept = replace(race, weights=ops.distribution(logits.clone(), *columns(rows, temperature, top_k, min_p, top_p)))
    order = [[place for place in row if place >= 0] for row in every.run(80)[0].tolist()]
    for row, (whole, left) in enumerate(zip(order, kept.run(80)[0].tolist(), strict=True)):
        assert [place for place in whole if kept.weights[row, place] > 0] == [place for place in left if place >= 0]


def test_drawn_tokens_follow_the_weights(isa: str) -> None:
    weights = torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.5, 1.5] * 25])
    count = 60_000
    expected = weights[0].double() / weights.sum() * count
    positive = expected > 0
    degrees = int(positive.sum()) - 1
    for seeds, indices in ((torch.full((count,), 5), torch.arange(count)), (torch.arange(count), torch.ones(count))):
        drawn = ops.draw(weights.expand(count, -1).contiguous(), seeds, indices.long())
        observed = torch.bincount(drawn, minlength=weights.shape[1]).double()
        assert observed[expected == 0].sum() == 0
        chi_square = ((observed - expected)[positive] ** 2 / expected[positive]).sum()
        assert chi_square < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations


def test_races_with_the_same_noise_agree_as_often_as_they_can(isa: str) -> None:
    """The chance that two distributions come to the same token: the sum of 1 / sum max(p_j / p_i, q_j / q_i)."""
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(2, 70, generator=generator) * 1.5).softmax(-1)
    count = 20_000
    seeds, indices = torch.arange(count), torch.arange(count) % 7
    one, other = (ops.draw(each.expand(count, -1).contiguous(), seeds, indices) for each in (p, q))
    wanted = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum())
    agreed = float((one == other).double().mean())
    assert abs(agreed - wanted) < 5 * (wanted * (1 - wanted) / count) ** 0.5
    bound = float(torch.minimum(p, q).sum())
    assert bound / (2 - bound) < agreed < bound + 0.02
    apart = ops.draw(q.expand(count, -1).contiguous(), seeds + count, indices)
    assert float((one == apart).double().mean()) < agreed / 2


def test_argmax_takes_the_first_largest_and_refuses_broken_rows(isa: str) -> None:
    logits = torch.randn(7, 1001)
    logits[1, [700, 900]] = 9.0
    logits[2, 5] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = NEVER
    logits[5, :1000] = NEVER
    logits[6, :] = NEVER
    logits[6, 1000] = float("nan")
    expected = REFERENCE.argmax(logits)
    assert expected.tolist()[1:] == [700, -1, -1, ops.NOTHING, 1000, -1]
    for backend in BACKENDS:
        with ops.use_backend(backend):
            assert ops.argmax(logits).tolist() == expected.tolist()
            best, likely = ops.argmax_with_probability(logits)
        assert best.tolist() == expected.tolist()
        assert likely[2:].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
        for row in (0, 1):
            assert likely[row] == pytest.approx(float(logits[row].double().softmax(-1).max()), rel=1e-5)


def test_changes_follow_their_definition() -> None:
    def whole(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    for backend in BACKENDS:
        logits = torch.tensor([[9.0] * 6, [2.0, -2.0, 1.0, 1.0, 3.0, 3.0]])
        added = torch.tensor([0.0, 0.0, 0.0, 0.5, -float("inf")])
        numbers = torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([0.25])
        with ops.use_backend(backend):
            ops.change_logits(
                *(logits, whole(1), whole(0, 0, 0, 0, 0), whole(0, 1, 3, 4, 5), added, whole(0, 1, 3, -1, 2)), *numbers
            )
        assert logits[0].tolist() == [9.0] * 6
        assert logits[1].tolist() == [1.0, -4.0 - 0.75, 1.0, 0.5 - 1.75, 3.5, -float("inf")]
