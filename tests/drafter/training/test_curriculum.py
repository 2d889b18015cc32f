"""Which texts training draws, from a real store."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.drafter.traffic import store as store_module
from slipstream.drafter.traffic.index import held_out
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.curriculum import Curriculum, Mix
from slipstream.drafter.training.packing import Example

PROMPT = 4
KB = 1024
EVEN = 300


def sample(number: int, length: int = 10, **fields: Any) -> Sample:
    """The text says which one it is; its features take 1 KB."""
    known = {
        "tenant": "",
        "domain": "",
        "target_version": 0,
        "drafter_version": 0,
        "time": 1e9 + number,
        "tokens": np.full(PROMPT + length, number, np.int32),
        "num_prompt": PROMPT,
        "start": 0,
        "features": torch.zeros(8, 1, KB // 16, dtype=torch.bfloat16),
        "topk": None,
        "greedy": True,
    }
    return Sample(**(known | fields))


def prepare(found: Sample) -> Example | None:
    assert found.features is not None
    return Example(found.tokens, found.num_prompt, found.start, found.features)


def computed(found: Sample) -> Example | None:
    """With features of its own, which are not those in the store."""
    example = prepare(found)
    return example and replace(example, features=example.features.clone())


def numbers(examples: Sequence[Example]) -> list[int]:
    return [int(example.tokens[-1]) for example in examples]


@pytest.fixture(scope="module", autouse=True)
def _few_texts_to_a_file() -> Iterator[None]:
    """As with texts of usual sizes: to read one takes as long as there are others in its file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_BYTES", 32 * KB)
        patch.setattr(store_module, "SMALL_BYTES", 0)
        yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrafficStore]:
    # The texts are from long ago.
    store = TrafficStore(tmp_path / "store", max_age=1e12)
    yield store
    store.close()


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrafficStore]:
    """EVEN texts of one length."""
    store = TrafficStore(tmp_path_factory.mktemp("even") / "store", max_age=1e12)
    store.append([sample(number) for number in range(1, EVEN + 1)])
    yield store
    store.close()


def trainable(store: TrafficStore) -> list[int]:
    return [int(found.tokens[-1]) for found in store.samples(holdout=False)]


def test_shares_of_the_mix(even: TrafficStore) -> None:
    curriculum = Curriculum(even, prepare, mix=Mix(recent=100, replay=0.4, long=0.0))
    assert curriculum.refresh() == 10 * len(trainable(even))
    drawn = numbers(list(islice(curriculum.draw(), 3000)))
    recent = set(trainable(even)[-100:])
    # Replay draws recent ones, too, as often as any.
    share = 0.6 + 0.4 * 100 / len(trainable(even))
    assert sum(number in recent for number in drawn) / len(drawn) == pytest.approx(share, abs=0.04)
    assert set(drawn) - recent


def test_recent_texts_come_in_turn(even: TrafficStore) -> None:
    curriculum = Curriculum(even, prepare, mix=Mix(recent=80, replay=0.0, long=0.0))
    curriculum.refresh()
    drawn = numbers(list(islice(curriculum.draw(), 160)))
    assert sorted(drawn[:80]) == sorted(drawn[80:]) == sorted(trainable(even)[-80:])
    assert drawn[:80] != drawn[80:]


def test_only_the_latest_texts_stay_recent_once_other_weights_answer(store: TrafficStore) -> None:
    curriculum = Curriculum(store, prepare, mix=Mix(carried=20, judged=100, replay=0.25, long=0.25))
    store.append([sample(number) for number in range(1, EVEN + 1)])
    curriculum.refresh()
    next(curriculum.draw())  # a turn of the old ones has begun
    old = set(trainable(store)[-20:])
    curriculum.target_changed()
    store.append([sample(number, target_version=1) for number in range(EVEN + 1, EVEN + 51)])
    curriculum.refresh()
    fresh = {number for number in trainable(store) if number > EVEN} | old
    drawn = numbers(list(islice(curriculum.draw(), 3000)))
    # All the same a quarter is replay of everything.
    share = 0.75 + 0.25 * len(fresh) / len(trainable(store))
    assert sum(number in fresh for number in drawn) / len(drawn) == pytest.approx(share, abs=0.03)
    assert min(drawn) < EVEN - 100
    judged = numbers(curriculum.held_out(EVEN).examples)
    kept = [int(found.tokens[-1]) for found in store.samples(holdout=True) if found.tokens[-1] > EVEN - 100]
    assert sorted(judged) == kept and kept[0] <= EVEN < kept[-1]


def test_long_texts_are_drawn_more_often(store: TrafficStore) -> None:
    store.append([sample(number, length=3 + number % 40) for number in range(1, 200)])
    curriculum = Curriculum(store, prepare, mix=Mix(replay=0.0, long=0.5))
    curriculum.refresh()
    lengths = [len(example.tokens) for example in islice(curriculum.draw(), 2000)]
    quarter = sorted(len(found.tokens) for found in store.samples(holdout=False))[-len(trainable(store)) // 4]
    assert sum(length >= quarter for length in lengths) / len(lengths) == pytest.approx(0.5 + 0.5 / 4, abs=0.06)


def test_the_reservoir_is_an_even_sample_of_all_that_came(even: TrafficStore) -> None:
    kept: Counter[int] = Counter()
    all_of_them = trainable(even)
    seeds, size = 10, 60
    for seed in range(seeds):
        curriculum = Curriculum(even, prepare, mix=Mix(recent=10, reservoir=size), seed=seed)
        curriculum.refresh()
        assert len(curriculum._reservoir) == size
        kept.update(known.id for known in curriculum._reservoir)
    fifth = len(all_of_them) // 5
    ids = [found.id for found in even.samples(holdout=False)]
    for part in range(5):
        found = sum(kept[id_] for id_ in ids[part * fifth : (part + 1) * fifth])
        expected = seeds * size / 5
        assert abs(found - expected) < 5 * expected**0.5, "one part of the stream is preferred"


def test_held_out_texts_are_never_drawn(even: TrafficStore) -> None:
    curriculum = Curriculum(even, prepare)
    curriculum.refresh()
    drawn = set(numbers(list(islice(curriculum.draw(), 2000))))
    found = curriculum.held_out(1000)
    held = numbers(found.examples)
    by_hash = {int(sample.tokens[-1]) for sample in even.samples() if held_out(sample.question)}
    assert set(held) == by_hash and len(held) > EVEN / 20
    assert held == sorted(held, reverse=True), "latest first"
    assert drawn.isdisjoint(held) and len(drawn) > EVEN / 2
    assert numbers(curriculum.held_out(3).examples) == held[:3]
    assert found.repeated == 0 and found.different == len(held)


def test_purged_texts_are_not_drawn_again(store: TrafficStore) -> None:
    store.append([sample(number, tenant="stays" if number % 2 else "goes") for number in range(1, 101)])
    curriculum = Curriculum(store, computed)
    curriculum.refresh()
    texts = curriculum.draw()
    assert {number % 2 for number in numbers(list(islice(texts, 100)))} == {0, 1}
    store.purge("goes")
    curriculum.drop()
    assert {number % 2 for number in numbers(list(islice(texts, 300)))} == {1}
    assert all(example.tokens[-1] % 2 for example in curriculum._cache.values())
    store.purge("stays")
    curriculum.drop()
    assert list(texts) == [] and curriculum.num_texts == 0 and curriculum._cached == 0


def test_purged_texts_that_nobody_dropped_end_nothing(store: TrafficStore) -> None:
    store.append([sample(number, tenant="stays" if number % 2 else "goes") for number in range(1, 101)])
    curriculum = Curriculum(store, prepare)
    curriculum.refresh()
    store.purge("goes")
    assert {number % 2 for number in numbers(list(islice(curriculum.draw(), 300)))} == {1}


def test_memory_is_bounded(even: TrafficStore) -> None:
    curriculum = Curriculum(even, computed, cache_bytes=20 * KB)
    curriculum.refresh()
    for _ in islice(curriculum.draw(), 300):
        held = sum(example.features.nbytes for example in curriculum._cache.values())
        assert held == curriculum._cached <= 20 * KB
    assert len(curriculum._cache) == 20
    curriculum.held_out(100)
    assert curriculum._cached <= 20 * KB


def test_what_lies_in_the_store_is_not_held_besides(even: TrafficStore) -> None:
    curriculum = Curriculum(even, prepare)
    curriculum.refresh()
    assert len(list(islice(curriculum.draw(), 30))) == 30
    assert not curriculum._cache


def test_only_what_belongs_to_the_route_is_counted_and_drawn(store: TrafficStore) -> None:
    store.append([sample(number, domain="code" if number % 3 else "") for number in range(1, 91)])
    curriculum = Curriculum(store, prepare, lambda found: found.domain == "code")
    curriculum.refresh()
    assert set(curriculum.counts) == {number for number in trainable(store) if number % 3}
    assert all(number % 3 for number in numbers([*islice(curriculum.draw(), 200), *curriculum.held_out(50).examples]))


def test_news_are_counted_once(store: TrafficStore) -> None:
    store.append([sample(number) for number in range(1, 50)])
    curriculum = Curriculum(store, prepare)
    first = curriculum.refresh()
    assert first == 10 * len(trainable(store)) and curriculum.refresh() == 0
    last = curriculum.last_id
    store.append([sample(number, greedy=False) for number in range(50, 200)])
    assert curriculum.refresh() == 10 * len(trainable(store)) - first
    assert not curriculum.is_greedy
    resumed = Curriculum(store, prepare)
    assert resumed.refresh(after=last) == 10 * len(trainable(store)) - first
    assert resumed.tokens == curriculum.tokens == first + 10 * len([n for n in trainable(store) if n >= 50])


def test_counts_fade_but_rare_tokens_stay_for_a_while(store: TrafficStore) -> None:
    store.append([sample(number) for number in range(1, 20)])
    curriculum = Curriculum(store, prepare)
    curriculum.refresh()
    token = trainable(store)[0]
    curriculum.forget(0.5)
    assert curriculum.counts[token] == 5
    for _ in range(4):
        curriculum.forget(0.5)
    assert 0 < curriculum.counts[token] < 1


def test_texts_that_cannot_be_used_end_drawing(even: TrafficStore) -> None:
    curriculum = Curriculum(even, lambda found: None)
    curriculum.refresh()
    assert list(curriculum.draw()) == [] and curriculum.held_out(10).examples == []


def test_short_answers_are_left_out(store: TrafficStore) -> None:
    store.append([sample(number, length=2) for number in range(1, 30)])
    curriculum = Curriculum(store, prepare)
    assert curriculum.refresh() == 0 and curriculum.num_texts == 0


def test_traffic_that_repeats_is_judged_by_what_repeats_in_its_share(store: TrafficStore) -> None:
    """Every second text is one of four questions, the others are asked once."""
    store.append([sample(number if number % 2 else 10_000 + number % 8) for number in range(1, 601)])
    curriculum = Curriculum(store, prepare)
    curriculum.refresh()
    drawn = set(numbers(list(islice(curriculum.draw(), 2000))))
    found = curriculum.held_out(100)
    repeated = np.array([number >= 10_000 for number in numbers(found.examples)])
    assert found.repeated == pytest.approx(0.5, abs=0.02)
    assert found.weights[repeated].sum() == pytest.approx(found.repeated)
    assert found.weights[~repeated].sum() == pytest.approx(1 - found.repeated)
    assert drawn.isdisjoint(np.array(numbers(found.examples))[~repeated]), "what is new was not learned"
    assert len(found.examples) > 60
    assert found.different == (~repeated).sum() + 4


def test_a_few_questions_asked_again_and_again(store: TrafficStore) -> None:
    store.append([sample(number % 8) for number in range(800)])
    curriculum = Curriculum(store, prepare)
    new = curriculum.refresh()
    learned = len(set(trainable(store)))
    assert new == curriculum.worth == pytest.approx(learned * 10 * 100**0.5)
    assert curriculum.tokens == learned * 1000
    found = curriculum.held_out(100)
    assert (found.different, found.repeated) == (8, 0.99)
    assert len(found.examples) > 90
    assert set(numbers(list(islice(curriculum.draw(), 500)))) == set(trainable(store))


def test_what_repeats_does_not_drive_out_the_rest(store: TrafficStore) -> None:
    store.append([sample(0 if number % 10 else number + 10) for number in range(900)])
    assert not held_out(store.questions()[2]), "choose another number"
    curriculum = Curriculum(store, prepare, mix=Mix(replay=0.5, long=0.0))
    curriculum.refresh()
    drawn = Counter(numbers(list(islice(curriculum.draw(), 3000))))
    often = 810**0.5
    others = len(drawn) - 1
    assert drawn[0] / 3000 == pytest.approx(often / (often + others), abs=0.06)
