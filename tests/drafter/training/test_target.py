"""The target after updates of its weights: which texts are learned from, with which matrices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.head import layout
from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.target_file import EMBEDDING, OUTPUT, UpdatedWeights
from slipstream.drafter.training.course import Course, WorkerOptions
from slipstream.drafter.training.curriculum import Mix
from slipstream.drafter.training.target import Serving, Target
from slipstream.engine.errors import ModelError
from slipstream.kernels.weight import DenseWeight

LINEAGES = ["", "run 7"]


@pytest.fixture(scope="module")
def targets(target_folder: Path) -> dict[str, Target]:
    return {lineage: Target(str(target_folder), 64, 256, lineage) for lineage in LINEAGES}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrafficStore]:
    store = TrafficStore(tmp_path / "store")
    yield store
    store.close()


@dataclasses.dataclass(frozen=True)
class Weights:
    """Who really answers: a run of the engine, the files it began with, and the update since."""

    run: int
    files: int
    update: int

    @property
    def are_of_files(self) -> bool:
        return self.update == 0


@given(st.data())
@settings(max_examples=300)
@pytest.mark.parametrize("lineage", LINEAGES)
def test_texts_count_for_the_weights_that_answered_them(
    targets: dict[str, Target], lineage: str, data: st.DataObject
) -> None:
    """Through starts, starts with other files (of a lineage), and updates, each at a time of its own."""
    target = targets[lineage]
    now, files_since = 1.0, 0.0
    weights = Weights(0, 0, 0)
    serving = Serving()
    running: list[tuple[float, Weights]] = []
    texts: list[tuple[Sample, Weights, Weights]] = []
    moves = ["begin", "begin", "end", "end", "update", "start", *(["other files"] if lineage else [])]
    for move in data.draw(st.lists(st.sampled_from(moves), min_size=3, max_size=25)):
        now += 1.0
        match move:
            case "begin":
                running.append((now, weights))
            case "end" if running:
                began, first = running.pop(0)
                # As the tap keeps it: features only where no update came between.
                features = data.draw(st.booleans()) and first == weights
                kept = Sample("", "", weights.update, 0, began, np.zeros(30, np.int32), 6, 0, None, None, True)
                if not features:
                    kept = dataclasses.replace(kept, start=30)
                kept = dataclasses.replace(kept, taps=target.taps if features else ())
                texts.append((kept, first, weights))
            case "update":
                weights = dataclasses.replace(weights, update=weights.update + 1)
                serving = Serving(UpdatedWeights(weights.update, now, target.fingerprint), files_since)
            case "start" | "other files":
                running = []
                files_since = now if move == "other files" else files_since
                weights = Weights(weights.run + 1, weights.files + (move == "other files"), 0)
                serving = Serving(None, files_since)
    target.serving = serving
    for kept, first, last in texts:
        by_files = first.are_of_files and last.are_of_files and first.files == weights.files
        served = first == last == weights or (by_files and weights.are_of_files)
        has_features = bool(kept.taps)
        expected = None if has_features or by_files else "no features"
        if not lineage and not served:
            expected = "other weights"
        assert target.unusable(kept) == expected


def update(store: TrafficStore, target: Target, version: int, since: float | None = None) -> dict[str, torch.Tensor]:
    """Writes other matrices, as the tap does; returns them."""
    size = (target.config.shape.vocab_size, target.config.hidden)
    matrices = {}
    for number, name in enumerate((EMBEDDING, OUTPUT)):
        matrices[name] = DenseWeight(*size, torch.bfloat16, torch.device("cpu"))
        matrices[name].fill(torch.randn(size, generator=torch.Generator().manual_seed(10 * version + number)))
    updated = UpdatedWeights(version, time.time() if since is None else since, target.fingerprint)
    target_file.write(store.index.folder, updated, matrices, torch.device("cpu"))
    everything = torch.arange(size[0])
    return {name: matrix.rows(everything).to(target.dtype) for name, matrix in matrices.items()}


def test_it_follows_what_serves(store: TrafficStore, target_folder: Path) -> None:
    target, other = (Target(str(target_folder), 64, 256, lineage) for lineage in LINEAGES)
    embedding, output = target.embedding, target.output
    assert not target.follow(store) and target.serving == Serving()

    update(store, other, 1)
    assert not target.follow(store) and torch.equal(target.embedding, embedding), "that of a lineage is not its own"

    for version in (1, 2):
        new = update(store, target, version)
        assert target.follow(store) and target.serving.version == version
        assert torch.equal(target.embedding, new[EMBEDDING]) and torch.equal(target.output, new[OUTPUT])
        assert not target.follow(store)

    (store.index.folder / target_file.FILE).write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="damaged"):
        target.follow(store)
    wrong = DenseWeight(3, 4, torch.bfloat16, torch.device("cpu"))
    updated = UpdatedWeights(3, 0.0, target.fingerprint)
    target_file.write(store.index.folder, updated, {EMBEDDING: wrong}, torch.device("cpu"))
    with pytest.raises(ModelError, match="the model has"):
        target.follow(store)
    assert target.serving.version == 2 and torch.equal(target.output, new[OUTPUT])

    target_file.remove(store.index.folder)
    assert target.follow(store) and target.serving.version == 0
    assert torch.equal(target.embedding, embedding) and torch.equal(target.output, output)


def test_output_rows_that_a_head_shares_follow(store: TrafficStore, target_folder: Path) -> None:
    target = Target(str(target_folder), 64, 256)
    config, cold = target.cold_head(torch.arange(64))
    own = layout.random_tensors(config, 0)
    head = target.trainable(config, cold)
    assert head.shares_output and not target.trainable(config, own).shares_output

    first = update(store, target, 1)
    target.follow(store)
    assert not head.has_rows_of(target.output)
    again = target.trainable(config, cold)
    assert again.shares_output and again.has_rows_of(first[OUTPUT]), "rows of the files are known"
    trained = layout.stored(again.tensors())
    kept = target.trainable(config, own)
    assert not kept.shares_output and torch.equal(kept.weights[OUTPUT], own[OUTPUT].to(kept.dtype))

    second = update(store, target, 2)
    target.follow(store)
    assert not target.trainable(config, trained).shares_output, "nobody can tell"
    assert target.trainable(config, trained, shares_output=True).has_rows_of(second[OUTPUT]), "but who trained it"
    colder = target.trainable(*target.cold_head(torch.arange(64)))
    assert colder.has_rows_of(second[OUTPUT])


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_course_learns_from_what_counts(
    store: TrafficStore, tmp_path: Path, target_folder: Path, traffic: Callable[..., list[Sample]], lineage: str
) -> None:
    target = Target(str(target_folder), 64, 256, lineage)
    options = WorkerOptions(model=str(target_folder), traffic="", registry="", lineage=lineage, first_tokens=1)
    course = Course(options, "", target, store)
    store.append(traffic(20, features=False))
    assert course.is_due(False) and course.curriculum.tokens == 34 * trained(store)
    assert course.described_passed_over() == ""
    course.spend(8 * 34 * trained(store))
    assert not course.is_due(False)

    course.curriculum._mix = Mix(carried=5)
    update(store, target, 1)
    store.append(traffic(15, seed=1, target_version=1))
    store.append(traffic(10, seed=2, target_version=1, features=False))
    assert target.follow(store)
    course.target_changed()
    assert course.is_due(False), "what is new is worth learning"
    said = course.described_passed_over()
    assert "10 have no hidden states" in said
    if lineage:
        assert said.startswith("10 texts") and dict(course.passed_over) == {"no features": 10}
    else:
        assert said.startswith("30 texts") and "20 were answered by weights that do not serve now" in said
    counted = {0, 1} if lineage else {1}
    ids = {found.id: found for found in store.samples()}
    for found in ids.values():
        usable = found.target_version in counted and (found.target_version == 0 or found.features is not None)
        assert (course.prepare(found) is not None) == usable
    assert len(course.curriculum._stream) == (35 if lineage else 15)
    fresh = [each for each in store.samples(holdout=False) if each.target_version == 1 and each.features is not None]
    assert len(course.curriculum._recent) == len(fresh) + (5 if lineage else 0)

    target_file.remove(store.index.folder)
    assert target.follow(store)
    course.target_changed()
    assert course.is_due(False) and course.prepare(ids[1]) is not None, "the files' weights serve again"


def trained(store: TrafficStore) -> int:
    return len(list(store.samples(holdout=False)))


def test_features_that_redaction_took_are_not_computed_with_other_weights(
    store: TrafficStore, target_folder: Path, traffic: Callable[..., list[Sample]]
) -> None:
    target = Target(str(target_folder), 64, 256, "run 7")
    options: Any = WorkerOptions(model=str(target_folder), traffic="", registry="", lineage="run 7")
    [sample] = traffic(1, target_version=1)
    course = Course(options, "", target, store)
    assert course.prepare(sample) is not None
    assert course.prepare(dataclasses.replace(sample, features=None)) is None


def test_damaged_texts_are_left_out_and_counted_once(
    store: TrafficStore, target_folder: Path, traffic: Callable[..., list[Sample]]
) -> None:
    """Bits that have changed in a shard: one such text would end the worker, or lose all beside it."""
    target = Target(str(target_folder), 64, 256)
    course = Course(WorkerOptions(model=str(target_folder), traffic="", registry=""), "", target, store)
    ids, logprobs = torch.zeros(34, 2, dtype=torch.int32), torch.zeros(34, 2, dtype=torch.float16)
    changes: list[dict[str, Any]] = [{}, {"topk": (ids, logprobs)}]
    for wrong in (float("nan"), float("inf"), 1e38):
        kept = traffic(1)[0].features
        assert kept is not None
        features = kept.clone()
        features[9, 0, 0] = wrong
        changes.append({"features": features})
    changes += [{"topk": (ids + 96, logprobs + 0)}, {"topk": (ids + 0, logprobs * float("nan"))}]
    samples = [dataclasses.replace(sample, **each) for sample, each in zip(traffic(7), changes, strict=True)]
    for token in (96, -1):
        [sample] = traffic(1)
        sample.tokens[20] = token
        samples.append(sample)
    store.append(samples)
    course.look()
    for _ in range(2):
        assert [course.prepare(each) is not None for each in store.samples()] == [True] * 2 + [False] * 7
    assert course.described_passed_over() == "7 texts cannot be learned from: 7 are damaged."
    assert 96 not in course.curriculum.counts and -1 not in course.curriculum.counts


def test_what_a_head_proposes_are_the_most_frequent_tokens(targets: dict[str, Target]) -> None:
    counts = {70: 3.0, 5: 1.0, 90: 2.0}
    assert targets[""].draft_tokens(counts, 2).tolist() == [70, 90]
    assert targets[""].draft_tokens(counts, 5).tolist() == [0, 1, 5, 70, 90]
    assert targets[""].draft_tokens(counts, 6, [9, 70, 80]).tolist() == [0, 5, 9, 70, 80, 90]


def test_what_a_head_proposed_before_stays_unless_others_come_much_more_often(targets: dict[str, Target]) -> None:
    counts = {70: 4.0, 5: 2.0, 90: 9.0}
    assert targets[""].draft_tokens(counts, 3, [9, 5, 80]).tolist() == [5, 9, 90]


def test_frozen_matrices_are_held_once(targets: dict[str, Target]) -> None:
    """In the numbers that are computed with, not also in those of the files."""
    target = targets[""]
    assert {target._of_files[EMBEDDING].data_ptr()} == {target._last_layer[EMBEDDING].data_ptr(), *embeddings(target)}
    head = target.trainable(*target.cold_head(torch.arange(64)))
    assert (
        head.weights[OUTPUT].dtype == target.dtype and head.weights[OUTPUT].data_ptr() == head._cast[OUTPUT].data_ptr()
    )
    head.refresh()
    assert head.weights[OUTPUT].data_ptr() == head._cast[OUTPUT].data_ptr()


def embeddings(target: Target) -> set[int]:
    """Where the embedding of the target lies, and of two heads."""
    heads = [target.trainable(*target.cold_head(torch.arange(64))) for _ in range(2)]
    return {target.embedding.data_ptr(), *(head._embedding.data_ptr() for head in heads)}
