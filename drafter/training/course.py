"""The training of one route's head: which traffic is its own, what it knows of it, where it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from slipstream.drafter.traffic.recompute import recompute
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.control import Mode
from slipstream.drafter.training.curriculum import LEAST_ANSWER, Curriculum
from slipstream.drafter.training.device import Place, find_place, training_bytes
from slipstream.drafter.training.gate import LEAST_TEXTS, Verdict
from slipstream.drafter.training.losses import LossName, default_loss
from slipstream.drafter.training.packing import Example
from slipstream.drafter.training.target import Target, Unusable
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.kernels.stored import Quantize

LONGER_STEPS_FROM, LONGER_STEPS = 100, 2
"""Rounds that begin after so many steps of a head's training take so many times as many positions per step:
orthogonalizing costs as much for many as for few, and a head that has come far gains less from each step than from each
position."""
LIVE_RATE = 0.125
"""The share of the learning rate with which a head goes on that serves already: what training ended with is near its
best, and large steps leave it. The head that is shipped, on other chats: with all of the rate its accept length falls
from 1.98 to 1.87 and was still below after 1.3 million positions; with a tenth it rises with the first 60,000."""
LEAST_RATE = 1 / 32
MUCH = 1.02
"""So many times the accept length of what is live, for sure, and there is far to go yet: larger steps are due."""


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    traffic: str
    """Folder of the traffic store."""
    registry: str
    mode: Mode = "idle"
    routes: tuple[str, ...] = ("",)
    """Routes to train heads for; see ``belongs``."""
    lineage: str = ""
    """Name of the target's lineage, where its weights change (RL); see drafter.registry.fingerprint."""
    quantize: Quantize = "none"
    """What the server quantises the target's numbers to."""
    loss: LossName | None = None
    """None: what suits the traffic."""
    depth: int = 3
    """Draft tokens in a row that are learned and that the gate counts."""
    draft_vocab_size: int = 8192
    first_tokens: int = 20_000
    """Tokens of answers with which the first round begins."""
    round_tokens: int = 100_000
    """Positions learned between two looks at the gate; fewer in the first rounds."""
    epochs: float = 8.0
    """How often each text is learned at most; then training waits for more traffic."""
    rows: int = 1024
    """Positions per step of the optimizer: fewer would spend more time on orthogonalizing than they gain."""
    part_rows: int = 512
    """Positions that one thread computes at least at once: fewer take longer each."""
    longest: int = 2048
    """Positions of a text, its last ones."""
    gate_texts: int = 200
    threads: int | None = None
    device: str = "cpu"
    """Where it computes: auto, cpu, cuda, or cuda:1, say; see ``find_place``."""
    engine_device: str | None = None
    """What the engine's option says that serves on this machine; None: none does."""
    gpu_memory_utilization: float = 0.9
    """The engine's option."""
    learning_rate: float = 2e-3
    cache_bytes: int = 1 << 30
    checkpoint_steps: int = 50
    """Steps of the optimizer between two checkpoints."""

    def place(self) -> Place:
        """Where to compute; raises ConfigError if what was asked for is not there, ModelError without the model."""
        if self.device == "cpu":
            return Place()
        return find_place(self.device, self.needed(), self.engine_device, self.gpu_memory_utilization, self.mode)

    def needed(self) -> int:
        """See ``training_bytes``; a GPU computes the whole step at once."""
        rows = LONGER_STEPS * self.rows
        return training_bytes(self.model, self.draft_vocab_size, self.depth, rows, rows, self.longest)


def belongs(sample: Sample, route: str) -> bool:
    """Whether a head of this route learns from this sample: "" from all, "tenant:NAME" and "domain:NAME" from some."""
    kind, _, name = route.partition(":")
    return not route or (sample.tenant if kind == "tenant" else sample.domain) == name


class Course:
    """The training of one route, with what it left in its last checkpoint."""

    def __init__(
        self,
        options: WorkerOptions,
        route: str,
        target: Target,
        store: TrafficStore,
        check: Callable[[], object] = lambda: None,
        folder: Path | None = None,
    ) -> None:
        """``check`` is called before features are recomputed; without ``folder`` nothing can be saved."""
        self.route = route
        self.learned = 0
        """Positions, since the worker's start."""
        self.trainer: Trainer | None = None
        self.parent: int | None = None
        """The version training began with."""
        self.published: int | None = None
        """The last version that came of it."""
        self.rate = 1.0
        """Share of the options' learning rate; see ``steps_back``."""
        self.passed_over: Counter[Unusable] = Counter()
        """Texts that cannot be learned from, by the reason."""
        self._damaged: set[int] = set()
        """Ids of texts among these whose numbers are."""
        self._options = options
        self._target = target
        self._store = store
        self._check = check
        self.curriculum = self._new_curriculum()
        self._credit = 0.0
        """Positions that the traffic is still good for."""
        self._counted = 0
        """Texts up to this id are in the credit already."""
        self._checkpoint: Checkpoint | None = None
        self._saved: Mapping[str, Any] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._checkpoint = Checkpoint(folder, route or "shared")
            self._checkpoint.clean()
            self._saved = self._checkpoint.load()
        if self._saved is not None and self._saved.get("target") != target.fingerprint:
            self._saved = None
        if self._saved is not None:
            self._take_over(self._saved)

    def _new_curriculum(self) -> Curriculum:
        return Curriculum(self._store, self.prepare, self._accepts, cache_bytes=self._options.cache_bytes)

    def _accepts(self, sample: Sample) -> bool:
        if not belongs(sample, self.route):
            return False
        if (why := self._target.unusable(sample)) is not None:
            self.passed_over[why] += 1
        return why is None

    def target_changed(self) -> None:
        """Other weights serve; unless a lineage says that drafters fit them all, what they answer is to be learned.

        What the head knows of those before is worth less: it may take large steps again.
        """
        self.rate = 1.0
        if self._target.lineage:
            self.curriculum.target_changed()
            return
        self.curriculum = self._new_curriculum()
        self.passed_over.clear()
        self._damaged.clear()
        self._credit, self._counted = 0.0, 0

    def described_passed_over(self) -> str:
        """A sentence for people; empty if nothing was."""
        count = self.passed_over.total()
        why: dict[Unusable, str] = {
            "other weights": "were answered by weights that do not serve now",
            "no features": "have no hidden states, which cannot be computed again for weights that are not in the "
            "model's files (keep them with --traffic-log features)",
            "damaged": "are damaged",
        }
        parts = [f"{self.passed_over[reason]:,} {said}" for reason, said in why.items() if self.passed_over[reason]]
        return f"{count:,} texts cannot be learned from: {', and '.join(parts)}." if count else ""

    def prepare(self, sample: Sample) -> Example | None:
        """The sample with the features of its end; recomputed where the store has none, or not those of the answer."""
        if self._target.unusable(sample) or len(sample.tokens) - sample.num_prompt < LEAST_ANSWER:
            return None
        if sample.features is None or not self._target.has_features(sample):
            if not self._target.serving.files_answered(sample):
                return None
            self._check()
            with suppress(ValueError):  # too long
                sample = recompute(sample, self._target.recompute())
        if sample.features is None or sample.taps != self._target.taps:
            return None
        likely = None
        if sample.topk is not None:
            likely = (sample.topk[0].numpy(), sample.topk[1].float().numpy())
        example = Example(sample.tokens, sample.num_prompt, sample.start, sample.features, likely)
        example = example.cut(self._options.longest)
        if not self._is_sound(example):
            self.passed_over["damaged"] += sample.id not in self._damaged
            self._damaged.add(sample.id)
            return None
        return example if example.length > example.num_context else None

    def _is_sound(self, example: Example) -> bool:
        """Whether it has numbers that can be computed with: one text without would take every step along that it is
        in, or end the worker, and again when that is started anew."""
        if example.likely is not None:
            ids, logprobs = example.likely
            if (ids >= self._target.config.shape.vocab_size).any() or np.isnan(logprobs).any():
                return False
        return bool(torch.linalg.vector_norm(example.features, dtype=torch.float32).isfinite())

    def is_due(self, asked: bool) -> bool:
        """Whether there is enough to learn from; where it was asked for, also if little of it is new."""
        self.look()
        enough = self.curriculum.tokens >= self._options.first_tokens
        return enough and (asked or self._credit > 0)

    def _take_over(self, saved: Mapping[str, Any]) -> None:
        """What a checkpoint says besides the trainer's state; nothing of a damaged one."""
        credit, counted = saved.get("credit"), saved.get("last_id")
        published, parent, rate = saved.get("published"), saved.get("parent"), saved.get("rate", 1.0)
        versions = all(each is None or isinstance(each, int) for each in (published, parent))
        rated = isinstance(rate, float) and LEAST_RATE <= rate <= 1
        if isinstance(credit, int | float) and isinstance(counted, int) and versions and rated:
            self._credit, self._counted, self.published, self.parent = credit, counted, published, parent
            self.rate = rate
        else:
            self._saved = None

    def look(self) -> None:
        """Takes notice of what came and what went."""
        self.curriculum.drop()
        new = self.curriculum.refresh(self._counted)
        if self.curriculum.last_id < self._counted:
            # Another store than before: all of it is new.
            self._credit, new = 0.0, self.curriculum.worth
        self._counted = 0
        # Texts that are gone are good for nothing, nor is a checkpoint made with a larger number of epochs.
        epochs = self._options.epochs
        self._credit = min(self._credit + epochs * new, epochs * self.curriculum.worth)

    def spend(self, positions: int) -> None:
        self.learned += positions
        # A round that was asked for may overdraw, but not so that what comes next is not learned.
        self._credit = max(self._credit - positions, -float(self._options.round_tokens))

    def options(self) -> TrainOptions:
        """Options that fit the traffic as it is now."""
        loss = self._options.loss or default_loss(self.curriculum.is_greedy)
        rate = self.rate * self._options.learning_rate
        return TrainOptions(loss=loss, steps=self._options.depth, learning_rate=rate)

    def steps_back(self, verdict: Verdict, learned: int) -> bool:
        """Takes the gate's verdict on a round for one on its learning rate, as a trust region does.

        Whether it was too large: the head is worse than what is live for sure, and what the round ``learned`` is to be
        learned again, from there and in smaller steps.
        """
        if verdict.different < LEAST_TEXTS:
            return False  # so few tell nothing for sure
        if verdict.least_ratio > MUCH:
            self.rate = min(2 * self.rate, 1.0)
        elif verdict.most_ratio < 1 and self.rate > LEAST_RATE:
            self.rate = max(self.rate / 2, LEAST_RATE)
            self._credit += learned
            return True
        return False

    def resume(self, trainer: Trainer) -> bool:
        """Goes on where the checkpoint was made; False if there is none, or it is of a head of other sizes.

        Then the trainer may be half changed.
        """
        saved, self._saved = self._saved, None
        if saved is None:
            return False
        try:
            trainer.resume(saved["trainer"])
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            return False
        return True

    def restart(self) -> None:
        """Leaves what was learned: the next round begins with what is live."""
        self.trainer, self.published, self._saved = None, None, None

    def save(self, wait: bool = False) -> str:
        """Returns why the checkpoint before could not be written, if so."""
        assert self.trainer is not None and self._checkpoint is not None
        state = {
            "trainer": self.trainer.state(),
            "target": self._target.fingerprint,
            "credit": self._credit,
            "last_id": self.curriculum.last_id,
            "parent": self.parent,
            "published": self.published,
            "rate": self.rate,
        }
        self._checkpoint.save(state, wait)
        error = self._checkpoint.error
        return f"the checkpoint was not written: {error}" if error else ""
