"""The law of the output does not depend on speculation: chi-square tests over the joint distribution of three tokens.

One engine runs with one seed a request. The other form runs one request for all seeds whose run is the same so far,
down to every draft token: 200,000 samples are a few hundred requests then. Networks race with the noise of the request,
so that no two seeds have the same draft tokens for long; they run in the first form, also compared seed by seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chi2_contingency
from torch import Tensor

from slipstream.drafter.draft_model import ModelDrafter
from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.loader import build_model
from slipstream.engine.runner import runner
from slipstream.engine.runner.sampler import Sampling, SamplingBatch, sample
from slipstream.engine.speculation.oracles import OracleDrafter, TreeOracleDrafter
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.speculation.tree import Tree, branches
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels import ops
from slipstream.kernels.compute import Formats

Engine = Callable[..., LocalEngine]
Joint = Counter[tuple[int, ...]]
LAWS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.2},
    "penalties": {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {1: 2.0, 5: -3.0}},
    "allowed": {"allowed_token_ids": (0, 2, 3, 7)},
}
LENGTH = 3
# Every pair of neighbours occurs, so that the n-gram drafter always has a proposal.
PAIRS = [token for a in range(8) for b in range(a, 8) for token in (a, b)]
ANSWERS = {tuple(PAIRS): [1, 0, 1, 2, 3, 4]}


def random_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 8)
    return FirstHead(config, layout.random_tensors(config, 0))


def make_drafters(kind: str, tiny: Path) -> tuple[list[Drafter], int]:
    """With the width of their trees."""

    def same_model(_: Any, length: int) -> Any:
        options = EngineConfig(model=str(tiny), dtype="float32")
        return build_model(open_checkpoint(str(tiny)), options, Formats.of(torch.float32), torch.device("cpu"), length)

    drafters: dict[str, tuple[Drafter, int]] = {
        "ngram": (NGramDrafter(), 1),
        "suffix": (SuffixDrafter(10_000), 1),
        "head": (HeadDrafter(random_head, stop_below=0.0), 1),
        "head tree": (HeadDrafter(random_head, stop_below=0.0, width=3), 3),
        "draft": (ModelDrafter(same_model, stop_below=0.0), 1),
        "draft tree": (ModelDrafter(same_model, stop_below=0.0, width=3), 3),
        "oracle": (OracleDrafter(ANSWERS, 0.8), 1),
        "oracle tree": (TreeOracleDrafter(ANSWERS, 0.8, 8), 3),
    }
    drafter, width = drafters[kind]
    return [drafter], width


LOOKUPS = ("ngram", "suffix", "oracle", "oracle tree")
NETWORKS = ("head", "head tree", "draft", "draft tree")
KINDS = LOOKUPS + NETWORKS


def joint(local: LocalEngine, samples: int, first_seed: int, params: dict[str, Any]) -> Joint:
    """How often each run of the next three tokens came, over so many seeds."""
    counts: Joint = Counter()
    for begin in range(0, samples, 128):
        completions = [
            local.submit(PAIRS, SamplingParams(**({"max_tokens": LENGTH + 2, "seed": first_seed + begin + i} | params)))
            for i in range(min(128, samples - begin))
        ]
        local.finish()
        counts.update(tuple(completion.tokens[:LENGTH]) for completion in completions)
    return counts


class ManySeeds:
    """Requests that each stand for a set of seeds, of which the first is the request's own.

    Tokens are sampled for all of them. Those for which the step brings other tokens than for the first leave the set,
    and begin anew with a request of their own; so every seed ends in a request all of whose steps are what they would
    be with this seed.
    """

    def __init__(self, local: LocalEngine, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.joint: Joint = Counter()
        self.drafted = 0
        """Draft tokens that were verified, over all seeds."""
        self._local = local
        self._params = params
        self._seeds: dict[int, NDArray[np.uint64]] = {}
        self._waiting: list[NDArray[np.uint64]] = []
        self._batch: SamplingBatch
        self._draw = ops.draw
        monkeypatch.setattr(runner, "sample", self._sample)
        monkeypatch.setattr(ops, "draw", self._sample_all)

    def run(self, samples: int, first_seed: int) -> Joint:
        self._waiting = [np.arange(first_seed, first_seed + samples, dtype=np.uint64)]
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for seeds in waiting:
                self._begin(seeds)
            self._local.finish()  # before the next ones begin: steps that prompts share verify nothing
        assert self.joint.total() == samples
        return self.joint

    def _begin(self, seeds: NDArray[np.uint64]) -> None:
        self._seeds[int(seeds[0])] = seeds
        self._local.submit(PAIRS, SamplingParams(**({"max_tokens": LENGTH + 5, "seed": int(seeds[0])} | self._params)))

    def _sample(self, logits: Tensor, batch: SamplingBatch, columns: Sequence[Tensor]) -> Sampling:
        self._batch = batch
        return sample(logits, batch, columns)

    def _sample_all(self, weights: Tensor, own: Tensor, indices: Tensor) -> Tensor:
        for seed, group in groupby(range(len(self._batch)), key=lambda place: int(self._batch.seeds[place])):
            if seed in self._seeds:
                self._split(seed, list(group), weights)
        return self._draw(weights, own, indices)

    def _split(self, seed: int, places: list[int], weights: Tensor) -> None:
        seeds, texts = self._seeds.pop(seed), [self._batch.history(place) for place in places]
        sampled = np.stack([self._sample_many(weights[place], place, seeds) for place in places], axis=1)
        self.drafted += len(seeds) * (len(texts) - 1)
        node_of = {text.tobytes(): node for node, text in enumerate(texts, -1)}
        tokens = [int(text[-1]) for text in texts[1:]]
        tree = Tree(tokens, [node_of[text[:-1].tobytes()] for text in texts[1:]])
        _, first, which = np.unique(sampled @ 8 ** np.arange(len(texts)), return_index=True, return_inverse=True)
        known = tuple(texts[0][len(PAIRS) :].tolist())
        outcomes = []
        for index in first:
            mine = sampled[index].tolist()
            right = tree.accepted(mine) if tokens else []
            outcomes.append((*known, mine[0], *(mine[node + 1] for node in right))[:LENGTH])
        distinct = {outcome: number for number, outcome in enumerate(dict.fromkeys(outcomes))}
        number_of = np.array([distinct[outcome] for outcome in outcomes])[which]
        for outcome, number in distinct.items():
            members = seeds[number_of == number]
            if len(outcome) == LENGTH:
                self.joint[outcome] += len(members)
            elif members[0] == seed:
                self._seeds[seed] = members
            else:
                self._waiting.append(members)

    def _sample_many(self, weights: Tensor, place: int, seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
        indices = torch.full((len(seeds),), int(self._batch.num_output[place]))
        many = weights.expand(len(seeds), -1).contiguous()
        sampled: NDArray[np.int64] = self._draw(many, torch.from_numpy(seeds.view(np.int64)), indices).numpy()
        return sampled


def p_value(a: Joint, b: Joint) -> float:
    """The p-value of the chi-square test that both come from one distribution; rare outcomes are taken together."""
    common = [key for key in a | b if a[key] + b[key] >= 20]
    table = np.array([[counts[key] for key in common] for counts in (a, b)])
    rest = np.array([[a.total()], [b.total()]]) - table.sum(1, keepdims=True)
    table = np.hstack([table, rest]) if rest.sum() >= 20 else table
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def law(engine: Engine, tiny: Path, kind: str, name: str, samples: int) -> float:
    """With a request per sample."""
    drafters, width = make_drafters(kind, tiny)
    plain = plain_of_each(engine, name, samples)
    speculating = engine(drafters, draft_width=width)
    speculated = joint(speculating, samples, 10_000_000, LAWS[name])
    drafted = sum(stats.draft_tokens for stats in speculating.stats.drafters)
    assert drafted > samples / 10, "too little was drafted for this test to say anything"
    return p_value(plain, speculated)


def law_of_many(
    engine: Engine, tiny: Path, kind: str, name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> float:
    """With a request for all samples that go the same way."""
    drafters, width = make_drafters(kind, tiny)
    plain = plain_of_many(engine, name, samples, monkeypatch)
    local = engine(drafters, draft_width=width)
    joint(local, 128, 5_000_000, LAWS[name])  # earlier answers, for the suffix drafter
    with monkeypatch.context() as patch:
        speculating = ManySeeds(local, LAWS[name], patch)
        speculated = speculating.run(samples, 10_000_000 * (1 + KINDS.index(kind)))
    assert speculating.drafted > samples, "too little was drafted for this test to say anything"
    return p_value(plain, speculated)


PLAIN: dict[tuple[str, str, int], Joint] = {}
"""What came without speculation, which has nothing to do with how the others draft."""


def plain_of_each(engine: Engine, name: str, samples: int) -> Joint:
    key = "each", name, samples
    if key not in PLAIN:
        PLAIN[key] = joint(engine(), samples, 1, LAWS[name])
    return PLAIN[key]


def plain_of_many(engine: Engine, name: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> Joint:
    key = "many", name, samples
    if key not in PLAIN:
        with monkeypatch.context() as patch:
            PLAIN[key] = ManySeeds(engine(), LAWS[name], patch).run(samples, 1)
    return PLAIN[key]


def law_of_network(
    engine: Engine, tiny: Path, kind: str, name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> float:
    """With a request per sample where it speculates, and ten times as many samples without.

    It is also asked that the same seeds say the same without, which needs far fewer samples to tell: draft tokens that
    are kept unseen in one request of a thousand change 0.04% of the samples. The law of 200,000 of them does not show
    it (in none of 20 trials, against two million without), while of 20,000 seeds eight say something else.
    """
    drafters, width = make_drafters(kind, tiny)
    plain = plain_of_many(engine, name, 10 * samples, monkeypatch)
    speculating = engine(drafters, draft_width=width)
    first_seed = 10_000_000 * (1 + KINDS.index(kind))
    speculated = joint(speculating, samples, first_seed, LAWS[name])
    assert sum(stats.draft_tokens for stats in speculating.stats.drafters) > samples / 2
    with monkeypatch.context() as patch:
        assert speculated == ManySeeds(engine(), LAWS[name], patch).run(samples, first_seed)
    return p_value(plain, speculated)


@pytest.mark.parametrize("kind", ["ngram", "oracle tree"])
def test_the_law_of_three_tokens_is_the_same(engine: Engine, tiny: Path, kind: str) -> None:
    assert law(engine, tiny, kind, "temperature", 3000) > 1e-4


@pytest.mark.parametrize("kind", LOOKUPS)
@pytest.mark.parametrize("name", ["temperature", "penalties"])
def test_the_law_is_the_same_over_many_seeds_at_once(
    engine: Engine, tiny: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert law_of_many(engine, tiny, kind, name, 20_000, monkeypatch) > 1e-4


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_law_is_the_same_where_networks_race(
    engine: Engine, tiny: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert law_of_network(engine, tiny, kind, "temperature", 2000, monkeypatch) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(LAWS))
def test_the_law_is_the_same_over_many_samples(
    engine: Engine, tiny: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in NETWORKS:
        assert law_of_network(engine, tiny, kind, name, 20_000, monkeypatch) > 1e-4
    else:
        assert law_of_many(engine, tiny, kind, name, 200_000, monkeypatch) > 1e-4


def test_many_seeds_at_once_bring_what_each_brings_alone(
    engine: Engine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters, width = make_drafters("oracle tree", tiny)
    alone = joint(engine(drafters, draft_width=width), 1000, 7, LAWS["penalties"])
    with monkeypatch.context() as patch:
        together = ManySeeds(engine(drafters, draft_width=width), LAWS["penalties"], patch).run(1000, 7)
    assert together == alone


accepted_nodes = Tree.accepted


def keep_the_first_path(self: Tree, sampled: list[int]) -> list[int]:
    """A planted error: draft tokens are kept if they can come at all, as if that were enough."""
    return branches(self.parents)[0]


def keep_one_more(self: Tree, sampled: list[int]) -> list[int]:
    """A planted error: off by one, what follows the first rejected draft token is kept, too."""
    right = accepted_nodes(self, sampled)
    return right + [node for node in branches(self.parents)[0] if node > max(right, default=-1)][:1]


@pytest.mark.parametrize("kind", ["oracle", "oracle tree"])
@pytest.mark.parametrize("mistake", [keep_the_first_path, keep_one_more])
def test_a_planted_error_is_found(
    engine: Engine, tiny: Path, kind: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "accepted", mistake)
    assert law(engine, tiny, kind, "temperature", 2000) < 1e-6
    assert law_of_many(engine, tiny, kind, "temperature", 20_000, monkeypatch) < 1e-6


def test_an_error_in_few_steps_is_found(engine: Engine, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted error: one step of 200 keeps its draft tokens unseen. Far more samples would not show it in the law."""
    calls = count()

    def keep_now_and_then(self: Tree, sampled: list[int]) -> list[int]:
        return branches(self.parents)[0] if next(calls) % 200 == 0 else accepted_nodes(self, sampled)

    plain_of_many(engine, "temperature", 20_000, monkeypatch)
    monkeypatch.setattr(Tree, "accepted", keep_now_and_then)
    with pytest.raises(AssertionError, match="Counter"):
        law_of_network(engine, tiny, "head", "temperature", 2000, monkeypatch)


def test_noise_of_another_index_is_found(engine: Engine, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted error: the places of draft tokens run with the noise of the token before them all."""
    draw = ops.draw

    def draw_with_the_first(weights: Tensor, seeds: Tensor, indices: Tensor) -> Tensor:
        first = [int(indices[seeds == seed].min()) for seed in seeds]
        return draw(weights, seeds, torch.tensor(first))

    monkeypatch.setattr(ops, "draw", draw_with_the_first)
    assert law(engine, tiny, "draft", "temperature", 1000) < 1e-6
