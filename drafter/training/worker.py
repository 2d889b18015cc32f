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

import msgspec
import torch

from slipstream.drafter.head import layout
from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import UnknownVersionError
from slipstream.drafter.traffic.store import TrafficStore
from slipstream.drafter.training.control import Control, Report, ServerGoneError, StandBy
from slipstream.drafter.training.course import LIVE_RATE, LONGER_STEPS, LONGER_STEPS_FROM, Course, WorkerOptions
from slipstream.drafter.training.device import memory_errors
from slipstream.drafter.training.gate import LEAST_TEXTS, Score, Verdict, judge, score
from slipstream.drafter.training.held_out import HeldOut
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, fill
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.threads import Threads
from slipstream.drafter.training.trainer import Trainer
from slipstream.engine.child import keep_for_good
from slipstream.engine.errors import ModelError, SlipstreamError, UnreadableError
from slipstream.engine.limits import usable_cores
from slipstream.engine.memory import trim

POLL_SECONDS = 2.0
LOOK_SECONDS = 5.0
"""How often a round takes notice of new traffic, and of purged traffic."""
REPORT_SECONDS = 1.0
FIRST_ROUND = 0.25
"""Size of the first round in full ones; the next are as large as what was learned so far. The first are worth most."""
KEPT_PRODUCTS = 128
"""Torch's matrix library compiles a product for each new number of rows, and keeps a thousand of them in each of two
caches, 0.6 MB apiece. What comes again, as weights and numbers of rows that are rounded do, fits into these."""
LONGEST_ROUND_SECONDS = 150.0
"""Training after which a round ends however little was learned: what is not live makes nothing faster."""


class Worker:
    def __init__(self, options: WorkerOptions, control: Control) -> None:
        for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
            os.environ.setdefault(cache, str(KEPT_PRODUCTS))
        self._options = options
        self._control = control
        self._place = options.place()
        self._place.enter()
        settle = self._place.settle if self._place.on_gpu else None
        self._stand_by = StandBy(control, lambda: self._report("paused"), settle)
        """Around all that computes, but not where the registry is locked: the server reads it, too."""
        # A GPU has one queue: more threads would only take turns with it.
        cores = 1 if self._place.on_gpu else options.threads or min(torch.get_num_threads(), usable_cores())
        self._threads = Threads(cores)
        torch.set_num_threads(1)
        self._store = TrafficStore(options.traffic)
        self._registry = Registry(options.registry)
        self._target = Target(
            options.model,
            options.draft_vocab_size,
            options.longest + 1,
            options.lineage,
            self._stand_by.wait,
            self._place,
            options.quantize,
        )
        self._arithmetic = self._place.describe(self._target.dtype)
        self._unreadable = ""
        """Why the weights that serve now cannot be read, if so."""
        self._courses: list[Course] = []
        self._follow_target()
        folder = self._registry.folder / "training"
        self._courses = [
            Course(options, route, self._target, self._store, control.check, folder) for route in options.routes
        ]
        self._checked: dict[str, tuple[int, bool]] = {}
        """The live version of each route as it was last looked at, and whether it can be trained on."""
        self._route = ""
        """What it is busy with."""
        self._busy = 0.0
        """Seconds of training, pauses not counted."""
        self._last_report = 0.0

    def run(self) -> None:
        """Trains until told to finish, or the server closes the line."""
        try:
            while not self._control.finishing:
                asked = self._control.take_due()
                worked = False
                for course in self._courses if self._follow_target() else ():
                    self._route = course.route
                    if not self._can_train(course):
                        continue
                    self._judge_candidates(course)
                    if self._is_due(course, bool(asked)):
                        worked |= self._round(course)
                if not worked:
                    self._control.report(self._waiting())
                    self._control.sleep(POLL_SECONDS)
        except ServerGoneError:
            pass
        for course in self._courses:
            if course.trainer is not None:
                course.save(wait=True)

    def _waiting(self) -> Report:
        """What it says while there is nothing to do, for all routes."""
        first = self._courses[0]
        return Report(
            "waiting",
            tokens=self._learned(),
            arithmetic=self._arithmetic,
            passed_over=first.passed_over.total(),
            message=self._unreadable or first.described_passed_over(),
        )

    def _follow_target(self) -> bool:
        """Whether the weights that serve now are known here."""
        before, self._unreadable = self._unreadable, ""
        try:
            if self._target.follow(self._store):
                for course in self._courses:
                    course.target_changed()
        except ModelError as error:
            self._unreadable = f"not training: {error}"
            if self._unreadable != before:
                self._control.report(Report("failed", tokens=self._learned(), message=self._unreadable))
        return not self._unreadable

    def _can_train(self, course: Course) -> bool:
        """Not while a head is live that is damaged, or of a kind that is served but not trained."""
        live = self._registry.serving(course.route)
        number = live.version if live else 0
        if course.route not in self._checked or self._checked[course.route][0] != number:
            readable = True
            try:
                if live is not None:
                    self._head(number)
            except ModelError as error:
                readable = False
                self._report("failed", version=number, message=f"not training beside drafter version {number}: {error}")
            self._checked[course.route] = number, readable
        return self._checked[course.route][1]

    def _is_due(self, course: Course, asked: bool) -> bool:
        # While a version is on trial, what is live may change at any moment.
        if self._registry.canary(course.route) is not None:
            return False
        with self._stand_by:
            return course.is_due(asked)

    def _round(self, course: Course) -> bool:
        """Whether anything was learned."""
        options = self._options
        with self._stand_by:
            trainer = self._begin(course)
        first_step, first_learned = trainer.step, course.learned
        size = min(max(int(FIRST_ROUND * options.round_tokens), course.learned), options.round_tokens)
        looked, busy = time.monotonic(), self._busy
        rows = self._rows(course, trainer.step)
        groups = fill(course.curriculum.draw(), self._part_rows(rows), options.longest)
        self._control.round_ends = False
        while (done := course.learned - first_learned) < size and not self._ends:
            if (lasted := self._busy - busy) > LONGEST_ROUND_SECONDS:
                break
            start, stood_by = time.monotonic(), self._stand_by.seconds
            with self._stand_by:
                progress = trainer.learn(self._parts(groups, rows))
            if not progress.tokens:
                break
            self._busy += time.monotonic() - start - (self._stand_by.seconds - stood_by)
            course.spend(progress.tokens)
            message = course.save() if trainer.step % options.checkpoint_steps == 0 else ""
            if time.monotonic() - looked > LOOK_SECONDS:
                with self._stand_by:
                    course.look()
                looked = time.monotonic()
            if message or time.monotonic() - self._last_report > REPORT_SECONDS:
                self._last_report = time.monotonic()
                share = min(max(done / size, lasted / LONGEST_ROUND_SECONDS), 1.0)
                self._report("training", loss=progress.loss, progress=share, message=message)
        learned = course.learned - first_learned
        if not learned:
            return False
        training = Training(
            samples=course.curriculum.num_texts,
            tokens=learned,
            steps=trainer.step - first_step,
            began=datetime.fromtimestamp(course.curriculum.oldest, UTC),
            ended=datetime.fromtimestamp(course.curriculum.newest, UTC),
            target_version=self._target.serving.version,
            shares_output=trainer.head.shares_output,
        )
        self._publish(course, trainer, training)
        course.save()
        trim()
        return True

    @property
    def _ends(self) -> bool:
        return self._control.finishing or self._control.round_ends

    def _parts(self, groups: Iterator[list[Example]], rows: int) -> Iterable[Sequence[Example]]:
        """Texts for one step of the optimizer over so many positions, each group for one thread."""
        size = 0
        while size < rows and (group := next(groups, None)):
            self._control.check()
            size += self._part_rows(rows)
            yield group

    def _rows(self, course: Course, step: int) -> int:
        """Positions for this step of the optimizer."""
        has_come_far = step >= LONGER_STEPS_FROM or course.rate < 1
        return self._options.rows * (LONGER_STEPS if has_come_far else 1)

    def _part_rows(self, rows: int) -> int:
        """Positions for one thread at once."""
        return max(rows // self._threads.count, self._options.part_rows)

    def _begin(self, course: Course) -> Trainer:
        """Goes on with what was trained last, unless the server went back to another version meanwhile, or the registry
        is another one, to which a child of those versions cannot be added."""
        if self._is_lost(course):
            course.restart()
        if course.trainer is None:
            trainer = self._new_trainer(course)
            if not course.resume(trainer):
                trainer = self._new_trainer(course)
                course.rate = 1.0 if trainer.is_cold or self._target.serving.version else LIVE_RATE
            course.trainer = trainer
        trainer, counts = course.trainer, course.curriculum.counts
        trainer.options = course.options()
        trainer.head.read_from(self._target.embedding)
        if trainer.head.shares_output:
            # As long as few tokens have come, those that the head proposed before are more likely than any others.
            size, before = trainer.head.config.draft_vocab_size, trainer.head.to_target.cpu().tolist()
            tokens = self._target.draft_tokens(counts, size, before)
            trainer.head.set_draft_vocabulary(tokens, self._target.output)
        course.curriculum.forget(0.9)
        return trainer

    def _is_lost(self, course: Course) -> bool:
        try:
            if course.parent is not None:
                self._registry.get(course.parent)
            return course.published is not None and self._registry.get(course.published).state == "rolled-back"
        except UnknownVersionError:
            return True

    def _new_trainer(self, course: Course) -> Trainer:
        """A trainer of the live version's head, or, where nothing is live, of the target's own last layer."""
        live = self._registry.serving(course.route)
        course.parent = live.version if live else None
        if live is not None:
            head = self._head(live.version)
        else:
            tokens = self._target.draft_tokens(course.curriculum.counts, self._target.head.draft_vocab_size)
            head = self._target.trainable(*self._target.cold_head(tokens))
        return Trainer(head, course.options(), is_cold=live is None, threads=self._threads)

    def _head(self, version: int) -> TrainableHead:
        return self._target.trainable(
            *self._registry.open_version(version, self._target.fingerprint, self._target.name),
            self._registry.get(version).manifest.training.shares_output,
        )

    def _publish(self, course: Course, trainer: Trainer, training: Training) -> None:
        """Adds the trained head to the registry as a candidate, if it passes the gate."""
        # What is judged is what will be in the file, to the last bit.
        config, tensors = trainer.head.config, layout.stored(trainer.published())
        candidate = self._target.trainable(config, tensors, training.shares_output)
        verdict = self._verdict(course, candidate, self._held_out(course))
        if course.steps_back(verdict, training.tokens):
            said = f"{verdict.describe()}: learning goes on from what is live, in smaller steps"
            self._report("refused", gate=verdict.metrics(), message=said)
            course.restart()
            course.trainer = self._new_trainer(course)
            return
        if not verdict.passes:
            self._report("refused", gate=verdict.metrics(), message=verdict.describe())
            return
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
        self._report("published", version=version.version, gate=verdict.metrics(), message=verdict.describe())

    def _judge_candidates(self, course: Course) -> None:
        """Versions that others put into the registry have to pass the gate, too."""
        for version in self._registry.list(course.route):
            if version.state != "candidate" or version.manifest.gate or "least_ratio" in version.metrics:
                continue
            number = version.version
            try:
                head = self._head(number)
            except UnreadableError:
                continue  # later, perhaps
            except SlipstreamError as error:
                self._refuse(number, str(error))
                continue
            texts = self._held_out(course)
            if texts.different < LEAST_TEXTS:
                return
            verdict = self._verdict(course, head, texts)
            self._registry.record_metrics(number, verdict.metrics())
            if verdict.passes:
                said = verdict.describe()
                self._report("published", version=number, foreign=True, gate=verdict.metrics(), message=said)
            else:
                self._refuse(number, f"gate: not better than what is live ({verdict.describe()})", verdict)

    def _refuse(self, version: int, reason: str, verdict: Verdict | None = None) -> None:
        # Somebody may have promoted it by hand meanwhile, which counts for more.
        if self._registry.get(version).state == "candidate":
            self._registry.retire(version, reason)
        metrics = verdict.metrics() if verdict else {}
        self._report("refused", version=version, foreign=True, gate=metrics, message=reason)

    def _verdict(self, course: Course, candidate: TrainableHead, texts: HeldOut) -> Verdict:
        self._report("gating")
        found = self._score(candidate, texts)
        live = self._registry.serving(course.route)
        known = found.without_drafting() if live is None else self._score(self._head(live.version), texts)
        return judge(found, known, self._control.speed, groups=texts.groups, repeated=texts.repeated)

    def _score(self, head: TrainableHead, texts: HeldOut) -> Score:
        with self._stand_by:
            found = score(head, texts.examples, self._options.depth, self._threads, self._control.check)
        return found.weighted(texts.weights)

    def _held_out(self, course: Course) -> HeldOut:
        with self._stand_by:
            return course.curriculum.held_out(self._options.gate_texts)

    def _report(self, state: str, **fields: object) -> None:
        course = next(course for course in self._courses if course.route == self._route)
        known = {
            "state": state,
            "route": course.route,
            "step": course.trainer.step if course.trainer else 0,
            "tokens": self._learned(),
            "tokens_per_second": self._learned() / self._busy if self._busy else 0.0,
            "arithmetic": self._arithmetic,
        }
        self._control.report(msgspec.convert(known | fields, Report))

    def _learned(self) -> int:
        return sum(course.learned for course in self._courses)


def main(arguments: Sequence[str]) -> int:
    """``arguments``: WorkerOptions as JSON."""
    options = msgspec.json.decode(arguments[0], type=WorkerOptions)
    control = Control(options.mode)
    try:
        with memory_errors():
            worker = Worker(options, control)
            keep_for_good()
            worker.run()
    except ServerGoneError:
        return 0
    except SlipstreamError as error:
        with suppress(ServerGoneError):
            control.report(Report("failed", message=str(error)))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
