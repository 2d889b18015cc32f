"""A head that is trained on answers and swapped in while requests run."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from slipstream.drafter.head import layout
from slipstream.drafter.training.device import Place, training_bytes
from slipstream.drafter.training.packing import Example
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.engine.operations import SwapDrafter
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.server.gpu_check.context import Context, Part
from slipstream.server.gpu_check.engines import config, engine
from slipstream.server.gpu_check.real import RealModel

DRAFT_VOCAB_SIZE = 8192
LONGEST = 400
TRAINING_S = 30.0
"""No step of training begins later."""
NEW_VERSION = 2


def parts(context: Context) -> Iterator[Part]:
    # Forked before anything has computed here, since neither threads of OpenMP nor a GPU's context outlive that.
    most_steps = 5 if context.dry_run else 60
    trainers = [TrainingProcess(context.scratch / name, most_steps, name) for name in ("cpu", context.device.type)]
    first_losses: dict[str, float] = {}
    for trainer in trainers:
        name = f"trained on {trainer.device} and swapped under load"
        yield Part(name, partial(_train_and_swap, context, trainer, first_losses))


@dataclass(frozen=True, slots=True)
class Trained:
    """What the training process tells of its work."""

    steps: int
    losses: tuple[float, ...]
    seconds: float
    most_bytes: int = 0
    """Bytes that tensors had on a GPU, at most at once."""
    said_bytes: int = 0
    """How many there are to be at most."""
    error: str = ""


def _train_and_swap(context: Context, trainer: TrainingProcess, first_losses: dict[str, float]) -> None:
    model = RealModel(context, or_another=True)
    answer = 60 if context.dry_run else 200
    options: dict[str, Any] = {"speculation": "head", "drafter": "random", "speculation_policy": "fixed"}
    options |= {"max_model_len": LONGEST, "max_draft_tokens": 3}
    with engine(config(context, model.path, **options)) as local:
        first = [local.submit(text, model.params(answer)) for text in model.texts]
        before = _steps(local, lambda: not local.engine.core.has_work)
        trainer.begin(model.path, _examples(model, first, context))
        load = Load(local, model, answer)
        during = _steps(local, lambda: trainer.is_done or context.left() < 10, load.fill)
        trained = trainer.result()
        if trained.error:
            raise RuntimeError(f"training failed: {trained.error}")
        swapped = local.engine.operate(SwapDrafter(NEW_VERSION, "", str(trainer.folder)))
        coming = _steps(local, swapped.done, load.fill)
        after = [local.submit(text, model.params(answer)) for text in model.texts]
        rest = _steps(local, lambda: not local.engine.core.has_work)
    report = swapped.result()
    rates = _accepted([*first, *load.asked, *after])
    context.row(
        "a head learns",
        model=model.name,
        trained_on=trainer.device,
        training_steps=trained.steps,
        seconds=trained.seconds,
        first_loss=trained.losses[0],
        last_loss=trained.losses[-1],
        accepted_before=rates.get(1),
        accepted_after=rates.get(NEW_VERSION),
        swap_pause_ms=report.pause_seconds * 1e3,
        prepared_in_s=report.prepare_seconds,
        ms_per_step_before=before,
        while_training=during,
        while_preparing=coming,
        after=rest,
    )
    on = f"on {trainer.device}, "
    context.check(on + "losses are numbers", all(map(math.isfinite, trained.losses)), str(trained.losses[-1]), "finite")
    if trainer.device == "cuda":
        said, most = (f"{size / 2**30:.2f} GiB" for size in (trained.said_bytes, trained.most_bytes))
        fits = trained.most_bytes <= trained.said_bytes
        context.check("training stays within the memory it is said to take", fits, most, f"at most {said}")
        here = first_losses.get("cpu")
        if here is not None:
            near = math.isclose(trained.losses[0], here, rel_tol=0.02)
            context.check("the first loss is the CPU's", near, f"{trained.losses[0]:.4f}", f"about {here:.4f}")
    first_losses[trainer.device] = trained.losses[0]
    learned = rates.get(NEW_VERSION, 0.0) > rates.get(1, 1.0)
    found = ", ".join(f"version {version}: {rate:.2f}" for version, rate in rates.items())
    context.check(
        on + "more draft tokens of the trained head are accepted", learned, found, "more of version 2 than of 1"
    )
    same = [one.tokens == other.tokens for one, other in zip(first, after, strict=True)]
    if context.dry_run:
        context.check(on + "answers are the same with another head", all(same), f"{sum(same)} of {len(same)}", "all")
    context.note(f"{sum(same)} of {len(same)} answers are the same before and after the swap.")


class Load:
    """Keeps as many requests running as there are texts."""

    def __init__(self, local: LocalEngine, model: RealModel, answer: int) -> None:
        self._local, self._model, self._answer = local, model, answer
        self.asked: list[Completion] = []

    def fill(self) -> None:
        running = sum(completion.finish_reason is None for completion in self.asked)
        for text in self._model.texts[: len(self._model.texts) - running]:
            self.asked.append(self._local.submit(text, self._model.params(self._answer)))


def _steps(local: LocalEngine, is_over: Any, fill: Any = lambda: None) -> float | None:
    """Steps until something is over, 10 minutes at most; milliseconds of one in the median."""
    taken: list[float] = []
    ends = time.monotonic() + 600
    while not is_over():
        if time.monotonic() > ends:
            raise TimeoutError("10 minutes of steps were not enough")
        fill()
        began = time.perf_counter()
        local.step()
        taken.append(time.perf_counter() - began)
    return median(taken) * 1e3 if taken else None


def _examples(
    model: RealModel, completions: Sequence[Completion], context: Context
) -> list[tuple[np.ndarray[Any, Any], int, torch.Tensor]]:
    target = Target(model.path, DRAFT_VOCAB_SIZE, LONGEST, place=Place(context.device))
    features = target.recompute().features
    texts = zip(model.texts, completions, strict=True)
    tokens = [(np.array([*text, *completion.tokens], np.int32), len(text)) for text, completion in texts]
    return [(each, prompt, features(each)) for each, prompt in tokens]


def _accepted(completions: Sequence[Completion]) -> dict[int, float]:
    """Accepted draft tokens among those verified, by version."""
    drafted: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for completion in completions:
        for delta in completion.deltas:
            drafted[delta.drafter_version] += delta.num_drafted
            accepted[delta.drafter_version] += delta.num_accepted
    return {version: accepted[version] / count for version, count in sorted(drafted.items()) if count}


class TrainingProcess:
    """Trains a head that begins as the model's last layer, and writes it to a folder.

    As a server's worker does, but not at its lowest priority, so that it is over in time on any machine.
    """

    def __init__(self, folder: Path, most_steps: int, device: str) -> None:
        self.folder, self.device = folder, device
        fork = multiprocessing.get_context("fork")
        self._connection, theirs = fork.Pipe()
        self._process = fork.Process(target=_train, args=(theirs, folder, most_steps, device), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, model: str, examples: list[tuple[np.ndarray[Any, Any], int, torch.Tensor]]) -> None:
        arrays = [(tokens, prompt, features.float().numpy()) for tokens, prompt, features in examples]
        self._connection.send((model, arrays))

    @property
    def is_done(self) -> bool:
        return self._connection.poll()

    def result(self) -> Trained:
        if not self.is_done:
            raise TimeoutError("training was not over when the stage's time was")
        try:
            told = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the training process ended with {self._process.exitcode}") from None
        assert isinstance(told, Trained)
        return told


def _train(connection: Connection, folder: Path, most_steps: int, device: str) -> None:
    """In a process of its own."""
    try:
        try:
            model, told = connection.recv()
        except EOFError:  # nobody wants anything trained
            return
        examples = [Example(tokens, prompt, 0, torch.from_numpy(each).bfloat16()) for tokens, prompt, each in told]
        began = time.perf_counter()
        target = Target(model, DRAFT_VOCAB_SIZE, LONGEST, place=Place(torch.device(device)))
        counts = Counter(token for each in examples for token in each.tokens[each.num_prompt :].tolist())
        size = target.head.draft_vocab_size
        trainer = Trainer(target.trainable(*target.cold_head(target.draft_tokens(counts, size))), TrainOptions())
        losses = [trainer.learn([[each] for each in examples]).loss]
        while len(losses) < most_steps and time.perf_counter() - began < TRAINING_S:
            losses.append(trainer.learn([[each] for each in examples]).loss)
        layout.write(folder, trainer.head.config, trainer.published())
        trained = Trained(len(losses), tuple(losses), time.perf_counter() - began)
        if device == "cuda":
            most = torch.cuda.max_memory_allocated()
            said = training_bytes(model, DRAFT_VOCAB_SIZE, trainer.options.steps, len(examples), 1, LONGEST)
            trained = replace(trained, most_bytes=most, said_bytes=said)
        connection.send(trained)
    except Exception as error:
        connection.send(Trained(0, (math.nan,), 0.0, error=f"{type(error).__name__}: {error}"))
