"""The training worker as the process it is, on a tiny target."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from slipstream.drafter.head import layout
from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import DATABASE_FILE, Registry
from slipstream.drafter.traffic import target_file
from slipstream.drafter.traffic.store import Sample
from slipstream.drafter.traffic.target_file import EMBEDDING, OUTPUT, UpdatedWeights
from slipstream.drafter.training.control import Control
from slipstream.drafter.training.control import Report as Told
from slipstream.drafter.training.course import LIVE_RATE, Course, WorkerOptions
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.trainer import Trainer
from slipstream.drafter.training.worker import Worker
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.models.config import decoder_config
from slipstream.kernels.weight import DenseWeight

SECONDS = 600.0
"""More than anything takes here, on a slow and busy machine too."""
Report = dict[str, Any]
MakeSamples = Callable[..., list[Sample]]


def test_it_learns_publishes_and_goes_on_after_a_kill(workshop: Any, traffic: MakeSamples) -> None:
    samples = traffic(150)
    workshop.store.append(samples[:10])
    worker = workshop.start()
    worker.wait_for("waiting")
    assert not workshop.registry.list(), "there is too little to learn from"
    workshop.store.append(samples[10:])
    first = workshop.train_first(worker)
    manifest = first.manifest
    assert manifest.origin == "trained" and manifest.target == workshop.fingerprint
    assert 20_000 <= manifest.training.tokens < 30_000, "a quarter of a round"
    assert manifest.training.steps > 10 and manifest.training.samples > 100
    assert manifest.training.began is not None and manifest.training.ended is not None
    assert manifest.training.began <= manifest.training.ended
    assert manifest.gate["accept_length"] > 1.2 and manifest.gate["live_accept_length"] == 1.0
    assert manifest.gate["least_ratio"] > 1 and manifest.gate["texts"] >= 8

    second = worker.wait_for("published")
    manifest = workshop.registry.get(second["version"]).manifest
    assert manifest.parent == first.version, "lineage"
    assert manifest.gate["live_accept_length"] == pytest.approx(first.manifest.gate["accept_length"])
    assert manifest.gate["accept_length"] > manifest.gate["live_accept_length"]
    assert second["tokens_per_second"] > 0

    worker.wait_for("training")
    before = workshop.checkpoint()["trainer"]["step"]
    worker.kill()
    reopened = Registry(workshop.registry.folder)
    for version in reopened.list():
        reopened.open_version(version.version, workshop.fingerprint)
    again = workshop.start()
    report = again.wait_for("training")
    assert report["step"] > before, "training began anew"
    assert report["tokens"] < 20_000, "what was learned before the kill is not the new process's speed"
    assert again.end() == 0
    assert workshop.checkpoint()["trainer"]["step"] >= report["step"]


def test_it_stops_for_requests_and_goes_on_when_it_is_calm(workshop: Any, traffic: MakeSamples) -> None:
    workshop.store.append(traffic(120))
    worker = workshop.start(mode="idle", round_tokens=10_000_000, checkpoint_steps=1)
    worker.wait_for("training")
    worker.say("load", running=3)
    worker.wait_for("paused")
    # Nothing is computed from here on, for however long: not one part, and not one step.
    worker.reports()
    step = workshop.checkpoint()["trainer"]["step"]
    time.sleep(0.5)  # far longer than between two reports
    assert worker.reports() == []
    assert workshop.checkpoint()["trainer"]["step"] <= step + 1, "the one that was being written"
    worker.say("load", running=0)
    assert worker.wait_for("training")["step"] > step
    assert worker.end() == 0


def test_load_is_nothing_to_a_worker_that_always_trains(
    workshop: Any, traffic: MakeSamples, target_folder: Path
) -> None:
    """Here, also, one of a lineage, after an update of the weights."""
    target = Target(str(target_folder), 64, 256, "run 7")
    rows, hidden = target.embedding.shape
    matrices = {name: DenseWeight(rows, hidden, torch.bfloat16, torch.device("cpu")) for name in (EMBEDDING, OUTPUT)}
    matrices[EMBEDDING].fill(target.embedding)
    matrices[OUTPUT].fill(target.output)
    updated = UpdatedWeights(3, time.time(), target.fingerprint)
    target_file.write(workshop.store.index.folder, updated, matrices, torch.device("cpu"))
    workshop.store.append(traffic(60, target_version=2) + traffic(60, seed=1, target_version=3))
    worker = workshop.start(lineage="run 7")
    worker.say("load", running=32)
    first = workshop.train_first(worker)
    assert first.manifest.target == target.fingerprint != workshop.fingerprint
    assert first.manifest.target_name == f"{target_folder.name}, lineage 'run 7'"
    assert first.manifest.training.target_version == 3 and first.manifest.training.shares_output
    worker.say("pause", paused=True)
    worker.wait_for("paused")
    assert first.manifest.gate["accept_length"] > 1
    assert worker.end() == 0, "a paused worker ends, too"


def test_tokens_are_enough(workshop: Any, traffic: MakeSamples) -> None:
    workshop.store.append(traffic(120, features=False))
    version = workshop.train_first(workshop.start())
    assert version.manifest.gate["accept_length"] > 1.2


def test_a_route_gets_a_head_of_its_own(workshop: Any, traffic: MakeSamples) -> None:
    other = [replace(sample, domain="code/py") for sample in traffic(120, seed=1)]
    workshop.store.append(other)
    worker = workshop.start(routes=["", "domain:code/py"], first_tokens=3000)
    number = worker.wait_for("published", route="domain:code/py")["version"]
    version = workshop.registry.get(number)
    assert (version.route, version.state) == ("domain:code/py", "candidate")
    assert version.manifest.parent is None
    assert workshop.checkpoint("domain:code/py")["trainer"]["step"] > 0
    assert workshop.checkpoint("shared")["trainer"]["step"] > 0
    assert worker.end() == 0


def test_a_bad_candidate_is_refused_and_a_good_one_is_not(experienced: Any) -> None:
    workshop = experienced
    good, better = workshop.registry.list()[:2]
    for version in workshop.registry.list():
        if version.state == "candidate":
            workshop.registry.retire(version.version)
    config, tensors = workshop.registry.open_version(better.version, workshop.fingerprint)
    generator = torch.Generator().manual_seed(0)
    shuffled = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
        if name.endswith("weight") and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }
    bad = workshop.registry.add(config, shuffled, target=workshop.fingerprint, origin="imported")
    taps = replace(config, taps=tuple(tap - 1 for tap in config.taps))
    strange = workshop.registry.add(taps, tensors, target=workshop.fingerprint, origin="imported")
    foreign = workshop.registry.add(config, tensors, target="another model", origin="imported")
    fine = workshop.registry.add(config, tensors, target=workshop.fingerprint, origin="imported")
    judging = workshop.start(first_tokens=10_000_000)
    assert judging.wait_for("refused", version=bad.version)["gate"]["accept_length"] < 1.3
    assert judging.wait_for("published", version=fine.version)["gate"]["least_ratio"] > 1
    assert judging.end() == 0
    states = {number: workshop.registry.get(number).state for number in (bad.version, foreign.version, fine.version)}
    assert states == {bad.version: "retired", foreign.version: "retired", fine.version: "candidate"}
    assert workshop.registry.history(bad.version)[-1].reason.startswith("gate: not better")
    assert workshop.registry.get(bad.version).metrics["least_ratio"] < 1
    assert "layers" in workshop.registry.history(strange.version)[-1].reason
    live = workshop.registry.live()
    assert live is not None and live.version == good.version


def test_nothing_is_trained_while_a_version_is_on_trial(experienced: Any) -> None:
    workshop = experienced
    # Further rounds, which may have ended before the worker did, need not have brought a better one.
    second = [version for version in workshop.registry.list() if version.state == "candidate"][-1].version
    learned = workshop.checkpoint()["trainer"]["step"]
    workshop.registry.start_canary(second)
    waiting = workshop.start()
    waiting.say("train", reason="drift")
    waiting.wait_for("waiting")
    waiting.wait_for("waiting")
    assert not [report for report in waiting.reports() if report["state"] != "waiting"]
    workshop.registry.roll_back(reason="worse")
    # What was learned after it is left, too: training begins with what is live.
    assert waiting.wait_for("training")["step"] < learned
    assert waiting.end() == 0


def test_a_registry_that_does_not_know_what_was_trained_gets_versions_all_the_same(experienced: Any) -> None:
    """A new one, or one from a backup: no version can be a child of one that it does not have."""
    workshop = experienced
    learned = workshop.checkpoint()
    assert learned["published"] and learned["parent"] is None
    (workshop.registry.folder / DATABASE_FILE).unlink()
    Registry(workshop.registry.folder)
    worker = workshop.start()
    worker.say("train")
    first = workshop.registry.get(worker.wait_for("published")["version"])
    assert first.version == 1 and first.manifest.parent is None
    assert worker.end() == 0


def test_training_ends_where_the_traffic_is_learned(workshop: Any, traffic: MakeSamples) -> None:
    workshop.store.append(traffic(60))
    worker = workshop.start(epochs=3.0, round_tokens=2000)
    worker.wait_for("published", "refused")
    report = worker.wait_for("waiting")
    while report["tokens"] < 3 * 34 * 40:
        report = worker.wait_for("waiting", "training")
    step = worker.wait_for("waiting")["tokens"]
    assert worker.wait_for("waiting")["tokens"] == step
    assert worker.end() == 0
    again = workshop.start(epochs=3.0, round_tokens=2000)
    assert again.wait_for("waiting", "training")["state"] == "waiting", "it was learned before the restart"
    again.say("train")
    again.wait_for("training", "published", "refused")
    assert again.end() == 0


def test_told_to_finish_it_judges_what_it_has(workshop: Any, traffic: MakeSamples) -> None:
    workshop.store.append(traffic(150))
    worker = workshop.start(round_tokens=10_000_000)
    while worker.wait_for("training")["tokens"] < 4000:
        pass
    worker.say("finish")
    worker.wait_for("published")
    assert worker.process.wait(SECONDS) == 0
    assert len(workshop.registry.list()) == 1
    worker.kill()


def test_told_to_judge_it_ends_the_round_and_goes_on_training(workshop: Any, traffic: MakeSamples) -> None:
    workshop.store.append(traffic(150))
    worker = workshop.start(round_tokens=10_000_000)
    worker.say("judge")  # before any: nothing comes of it
    while worker.wait_for("training")["tokens"] < 4000:
        pass
    worker.say("judge")
    first = worker.wait_for("published", "refused")
    while (report := worker.wait_for("training", "published", "refused"))["tokens"] < first["tokens"] + 2000:
        assert report["state"] == "training"
    worker.kill()
    assert workshop.registry.list()[0].manifest.training.tokens < 2_000_000


def test_beside_a_live_head_that_it_cannot_train_on_it_waits_for_another(
    workshop: Any, traffic: MakeSamples, target_folder: Path
) -> None:
    target = decoder_config(open_checkpoint(str(target_folder)).config)
    good = layout.config_for(target, 64)

    def make_live(config: layout.HeadConfig) -> int:
        tensors = layout.random_tensors(config, 0)
        version = workshop.registry.add(config, tensors, target=workshop.fingerprint, origin="imported").version
        return workshop.registry.promote(version).version

    workshop.store.append(traffic(150))
    strange = make_live(replace(good, taps=tuple(tap - 1 for tap in good.taps)))
    worker = workshop.start()
    report = worker.wait_for("failed")
    assert report["version"] == strange and "reads layers" in report["message"]
    worker.wait_for("waiting")
    worker.wait_for("waiting")  # it neither ended nor says so again
    make_live(good)
    worker.wait_for("training")
    assert worker.end() == 0


def test_while_few_tokens_have_come_a_head_proposes_what_it_did_before(
    workshop: Any, traffic: MakeSamples, target_folder: Path
) -> None:
    target = Target(str(target_folder), 64, 256)
    own, samples = range(32, 96), traffic(3)
    config, tensors = target.cold_head(torch.tensor(own))
    version = workshop.registry.add(config, tensors, target=workshop.fingerprint, origin="imported", gate={"texts": 1})
    workshop.registry.promote(version.version)
    workshop.store.append(samples)
    proposed: set[int] = set()
    over = threading.Event()

    class Watched(Worker):
        def _publish(self, course: Course, trainer: Trainer, training: Training) -> None:
            proposed.update(trainer.head.to_target.tolist())
            over.set()

    def lines() -> Iterator[str]:
        assert over.wait(SECONDS)
        yield '{"type": "finish"}'

    options = msgspec.convert(workshop.options | {"first_tokens": 1, "round_tokens": 256}, WorkerOptions)
    Watched(options, Control("always", lines(), lambda _: None)).run()
    came = {int(token) for sample in samples for token in sample.tokens[sample.num_prompt :]}
    assert proposed <= came | set(own) and came != proposed


def test_weights_that_cannot_be_read_are_told_once_and_waited_for(
    workshop: Any, traffic: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.drafter.training.worker.POLL_SECONDS", 0.01)
    workshop.store.append(traffic(10))
    file = workshop.store.index.folder / target_file.FILE
    file.write_bytes(b"rubbish")
    told: list[Told] = []
    over = threading.Event()

    def hear(report: Told) -> None:
        told.append(report)
        if len(told) == 5:
            file.unlink()
        if report.state == "waiting" and not report.message:
            over.set()

    def lines() -> Iterator[str]:
        assert over.wait(SECONDS)
        yield '{"type": "finish"}'

    options = msgspec.convert(workshop.options, WorkerOptions)
    Worker(options, Control("always", lines(), hear)).run()
    assert [report.state for report in told[:5]] == ["failed", *4 * ["waiting"]]
    assert all(str(file) in report.message and "damaged" in report.message for report in told[:5])


def test_what_cannot_work_is_said(workshop: Any, tmp_path: Path) -> None:
    worker = workshop.start(model=str(tmp_path / "nowhere"))
    assert worker.process.wait(SECONDS) == 2
    worker.kill()
    [report] = worker.reports()
    assert report["state"] == "failed" and "nowhere" in report["message"]


@pytest.mark.slow
def test_killed_at_a_hundred_moments(workshop: Any, traffic: MakeSamples) -> None:
    """Whatever the moment: the registry is readable, its versions whole, and training goes on."""
    workshop.store.append(traffic(150))
    rng = random.Random(0)
    # Short rounds, so that many moments fall into writing.
    options = {"round_tokens": 256, "checkpoint_steps": 1, "gate_texts": 12, "mode": "always"}
    steps: list[int] = []
    for _ in range(100):
        worker = workshop.start(**options)
        worker.wait_for("training", "published", "refused", "gating")
        time.sleep(rng.uniform(0, 0.5))
        worker.kill()
        registry = Registry(workshop.registry.folder)
        versions = registry.list()
        for version in versions[-3:]:
            registry.open_version(version.version, workshop.fingerprint)
        assert set((registry.folder / "versions").iterdir()) == {registry.path(each.version) for each in versions}
        if versions and versions[-1].state == "candidate" and rng.random() < 0.2:
            registry.promote(versions[-1].version)
        file = registry.folder / "training" / "shared.pt"
        if file.exists():
            steps.append(workshop.checkpoint()["trainer"]["step"])
    assert steps == sorted(steps) and steps[-1] > 50, "training goes on from its checkpoints"
    assert len(registry.list()) > 5


def test_a_head_that_serves_goes_on_in_small_steps(experienced: Any) -> None:
    """A cold one learned here with all of the rate; without its checkpoint only the live version is left of it."""
    workshop = experienced
    assert workshop.checkpoint()["rate"] == 1
    shutil.rmtree(workshop.registry.folder / "training")
    worker = workshop.start(round_tokens=10_000_000)
    worker.wait_for("training")
    assert workshop.checkpoint()["rate"] == LIVE_RATE
    worker.kill()
