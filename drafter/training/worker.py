"""The process that trains heads while the server serves: ``python -m slipstream.drafter.training.worker OPTIONS``.

It reads the traffic store, publishes to the registry, and can be killed at any moment: what it loses is the training
since its last checkpoint. The server decides what becomes of a published version.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import msgspec
import torch

from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.control import Control, Mode, Report, ServerGoneError
from slipstream.drafter.training.curriculum import Curriculum
from slipstream.drafter.training.gate import Score, Verdict, judge, score
from slipstream.drafter.training.losses import LossName, default_loss
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, fill
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.engine.errors import SlipstreamError

POLL_SECONDS = 2.0
CHECKPOINT_STEPS = 50
REPORT_SECONDS = 1.0


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    traffic: str
    """Folder of the traffic store."""
    registry: str
    mode: Mode = "idle"
    routes: tuple[str, ...] = ("",)
    """Routes to train heads for; see ``belongs``."""
    lineage: str = ""
    """Of the target, where its weights change (RL); see drafter.registry.fingerprint."""
    loss: LossName | None = None
    """None: what suits the traffic."""
    depth: int = 3
    """Guesses in a row that are learned and that the gate counts."""
    draft_vocab_size: int = 8192
    first_tokens: int = 20_000
    """Tokens of answers with which the first round begins."""
    round_tokens: int = 100_000
    """Positions learned between two looks at the gate."""
    epochs: float = 8.0
    """How often each text is learned at most; then training waits for more traffic."""
    rows: int = 2048
    """Positions per step of the optimizer."""
    part_rows: int = 1024
    """Positions computed at once: training stops for requests after so many."""
    longest: int = 2048
    """Positions of a text, its last ones."""
    gate_texts: int = 200
    threads: int | None = None
    learning_rate: float = 2e-3
    cache_bytes: int = 1 << 30


def belongs(sample: Sample, route: str) -> bool:
    """Whether a head of this route learns from this sample: "" from all, "tenant:NAME" and "domain:NAME" from some."""
    kind, _, name = route.partition(":")
    return not route or (sample.tenant if kind == "tenant" else sample.domain) == name


class _Course:
    """The training of one route's head: what it knows, where it stands."""

    def __init__(self, options: WorkerOptions, route: str, target: Target, store: TrafficStore) -> None:
        self.route = route
        self.learned = 0
        """Positions, since the worker's start."""
        self.trainer: Trainer | None = None
        self.parent: int | None = None
        """The version training began with."""
        self.published: int | None = None
        """The last version that came of it."""
        self.greedy = self.texts = 0
        self._target = target
        self._longest = options.longest
        self.curriculum = Curriculum(
            store, self._prepare, lambda sample: belongs(sample, route), cache_bytes=options.cache_bytes
        )
        name = route.replace(":", "-").replace("/", "-") or "shared"
        folder = Path(options.registry) / "training"
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = Checkpoint(folder / f"{name}.pt")

    def _prepare(self, sample: Sample) -> Example | None:
        example = self._target.example(sample, self._longest)
        if example is not None:
            self.texts += 1
            self.greedy += sample.greedy
        return example


class Worker:
    def __init__(self, options: WorkerOptions, control: Control) -> None:
        self._options = options
        self._control = control
        if options.threads:
            torch.set_num_threads(options.threads)
        self._store = TrafficStore(options.traffic)
        self._registry = Registry(options.registry)
        self._target = Target(options.model, options.draft_vocab_size, options.longest + 1, options.lineage)
        self._courses = [_Course(options, route, self._target, self._store) for route in options.routes]
        self._busy = 0.0
        self._last_report = 0.0

    def run(self) -> None:
        """Trains until the server closes the line."""
        try:
            while True:
                self._control.report(Report("waiting"))
                asked = self._control.take_due()
                worked = False
                for course in self._courses:
                    self._judge_candidates(course)
                    if self._is_due(course, bool(asked)):
                        self._round(course)
                        worked = True
                if not worked:
                    self._control.sleep(POLL_SECONDS)
        except ServerGoneError:
            for course in self._courses:
                if course.trainer is not None:
                    self._save(course, wait=True)

    def _is_due(self, course: _Course, asked: bool) -> bool:
        course.curriculum.refresh()
        tokens = course.curriculum.tokens
        if tokens < self._options.first_tokens or self._registry.canary(course.route) is not None:
            return False
        return asked or course.learned < self._options.epochs * tokens

    def _round(self, course: _Course) -> None:
        options = self._options
        course.curriculum.drop()
        trainer = self._begin(course)
        began = datetime.now(UTC)
        first_step, first_learned = trainer.step, course.learned
        groups = fill(course.curriculum.draw(), options.part_rows, options.longest)
        while (done := course.learned - first_learned) < options.round_tokens:
            start, paused = time.monotonic(), [0.0]
            progress = trainer.learn(self._parts(course, groups, paused))
            if not progress.tokens:
                return
            self._busy += time.monotonic() - start - paused[0]
            course.learned += progress.tokens
            if trainer.step % CHECKPOINT_STEPS == 0:
                self._save(course)
            if time.monotonic() - self._last_report > REPORT_SECONDS:
                self._last_report = time.monotonic()
                self._control.report(
                    Report(
                        "training",
                        course.route,
                        progress.step,
                        progress.loss,
                        course.learned,
                        self._rate(),
                        min(done / options.round_tokens, 1.0),
                    )
                )
        training = Training(
            samples=course.curriculum.num_texts,
            tokens=course.learned - first_learned,
            steps=trainer.step - first_step,
            began=datetime.fromtimestamp(course.curriculum.oldest, UTC),
            ended=began,
        )
        self._publish(course, trainer, training)
        self._save(course)

    def _parts(
        self, course: _Course, groups: Iterator[list[Example]], paused: list[float]
    ) -> Iterable[Sequence[Example]]:
        """Texts for one step of the optimizer; waits between them while requests run."""
        for group in islice(groups, max(self._options.rows // self._options.part_rows, 1)):
            paused[0] += self._control.wait(lambda: self._control.report(Report("paused", course.route)))
            yield group

    def _begin(self, course: _Course) -> Trainer:
        """Goes on with what was trained last, unless the server went back to another version meanwhile."""
        live = self._registry.live(course.route) or (self._registry.live("") if course.route else None)
        rolled_back = course.published is not None and self._registry.get(course.published).state == "rolled-back"
        state = course.checkpoint.load() if course.trainer is None else None
        if course.trainer is None or rolled_back:
            course.parent = live.version if live else None
            head = self._head(live.version if live else None, course)
            course.trainer = Trainer(head, self._train_options(course))
            if state is not None and not rolled_back and state["target"] == self._target.fingerprint:
                with suppress(KeyError, ValueError, RuntimeError):
                    course.trainer.resume(state["trainer"])
                    course.learned, course.parent = state["learned"], state["parent"]
        course.curriculum.forget(0.9)
        course.trainer.head.guess_from(self._target.draft_tokens(course.curriculum.counts), self._target.output)
        return course.trainer

    def _train_options(self, course: _Course) -> TrainOptions:
        loss = self._options.loss or default_loss(2 * course.greedy >= course.texts)
        return TrainOptions(loss=loss, steps=self._options.depth, learning_rate=self._options.learning_rate)

    def _head(self, version: int | None, course: _Course) -> TrainableHead:
        """A version's head; without one, a head that starts as the target's last layer."""
        if version is not None:
            config, tensors = self._registry.open_version(version, self._target.fingerprint)
        else:
            config, tensors = self._target.cold_head(self._target.draft_tokens(course.curriculum.counts))
        return TrainableHead(config, self._target.config, self._target.embedding, tensors)

    def _publish(self, course: _Course, trainer: Trainer, training: Training) -> None:
        config, tensors = trainer.head.config, trainer.published()
        candidate = TrainableHead(config, self._target.config, self._target.embedding, tensors)
        verdict = self._verdict(course, candidate)
        report = Report(
            "published" if verdict.passes else "refused",
            course.route,
            trainer.step,
            tokens=course.learned,
            tokens_per_second=self._rate(),
            gate=verdict.metrics(),
        )
        if verdict.passes:
            version = self._registry.add(
                config,
                tensors,
                target=self._target.fingerprint,
                target_name=self._target.name,
                origin="trained",
                route=course.route,
                parent=course.published or course.parent,
                training=training,
                gate=verdict.metrics(),
            )
            course.published = version.version
            report = msgspec.structs.replace(report, version=version.version)
        self._control.report(report)

    def _judge_candidates(self, course: _Course) -> None:
        """Versions that others put into the registry have to pass the gate, too."""
        for version in self._registry.list(course.route):
            if version.state != "candidate" or version.manifest.gate or "least_ratio" in version.metrics:
                continue
            try:
                verdict = self._verdict(course, self._head(version.version, course))
            except SlipstreamError as error:
                self._registry.retire(version.version, str(error))
                self._control.report(Report("refused", course.route, version=version.version, message=str(error)))
                continue
            if not verdict.texts:
                return
            self._registry.record_metrics(version.version, verdict.metrics())
            if not verdict.passes:
                self._registry.retire(version.version, f"gate: not better than what is live ({verdict.describe()})")
            report = Report("refused", course.route, version=version.version, gate=verdict.metrics())
            self._control.report(msgspec.structs.replace(report, state="published") if verdict.passes else report)

    def _verdict(self, course: _Course, candidate: TrainableHead) -> Verdict:
        self._control.wait(lambda: self._control.report(Report("paused", course.route)))
        self._control.report(Report("gating", course.route))
        texts = course.curriculum.held_out(self._options.gate_texts)
        live = self._registry.live(course.route) or (self._registry.live("") if course.route else None)
        depth = self._options.depth
        found = score(candidate, texts, depth)
        if live is None:
            return judge(found, Score.without_guesses(found), self._control.speed)
        config, tensors = self._registry.open_version(live.version, self._target.fingerprint)
        head = TrainableHead(config, self._target.config, self._target.embedding, tensors)
        return judge(found, score(head, texts, depth), self._control.speed)

    def _save(self, course: _Course, wait: bool = False) -> None:
        assert course.trainer is not None
        state = {
            "trainer": course.trainer.state(),
            "learned": course.learned,
            "parent": course.parent,
            "target": self._target.fingerprint,
        }
        course.checkpoint.save(state, wait)

    def _rate(self) -> float:
        return sum(course.learned for course in self._courses) / self._busy if self._busy else 0.0


def main(arguments: Sequence[str]) -> int:
    """``arguments``: WorkerOptions as JSON."""
    options = msgspec.json.decode(arguments[0], type=WorkerOptions)
    with suppress(OSError, AttributeError):
        # Runs only where nobody else wants the processor.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    control = Control(options.mode)
    try:
        Worker(options, control).run()
    except SlipstreamError as error:
        control.report(Report("failed", message=str(error)))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
