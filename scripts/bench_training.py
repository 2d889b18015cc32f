"""How fast a head is trained, and what a checkpoint holds up, on the default model and real text: tables in Markdown.

    python scripts/bench_training.py --texts 24 --rounds 5

The same texts are learned packed (as the worker does), padded (every text of a part filled up to the longest), and one
at a time (every text a part of its own), with the same optimizer steps after the same texts; only positions of real
answers count. Threads compute parts beside each other, as in the worker; "operations shared" has torch share each
operation among them instead. With ``--evolve idle`` each matrix asks first whether requests run. A checkpoint's
stall is how long training waits for it: for everything with the frozen weights, for the trained part, and for the copy
that a thread then writes. Ways take turns within a round; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.control import Control, StandBy
from slipstream.drafter.training.packing import Example, fill
from slipstream.drafter.training.target import Target
from slipstream.drafter.training.threads import Threads
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.loadtest.dataset import ShareGPT, is_mostly_ascii
from slipstream.server.text import load_tokenizer

LONGEST = 1024
DRAFT_VOCAB_SIZE = 8192
Parts = list[list[Example]]


@dataclass(frozen=True, slots=True)
class Way:
    """How the same texts are learned."""

    trainer: Trainer
    steps: list[Parts]
    cores: int = 1
    """That torch shares each operation among."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1024, help="positions per step of the optimizer")
    parser.add_argument("--part-rows", type=int, default=512, help="positions one thread computes at once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(1)

    target = Target("default", DRAFT_VOCAB_SIZE, LONGEST + 1)
    texts = read_texts(target, options.texts)
    counts = Counter(token for text in texts for token in text.tokens[text.num_prompt :].tolist())
    cold = target.cold_head(target.draft_tokens(counts, DRAFT_VOCAB_SIZE))
    reads, _ = os.pipe()  # nothing is ever said
    stand_by = StandBy(Control("idle", os.fdopen(reads)), waiting=lambda: None)

    def trainer(threads: int = options.threads, between: Callable[[], object] = lambda: None) -> Trainer:
        """Of a head of its own: what knows more of the texts drafts on at more positions, which takes longer."""
        head = target.trainable(*cold)
        head.between = between
        return Trainer(head, TrainOptions(), threads=Threads(threads))

    lengths = sorted(text.length for text in texts)
    learned = sum(text.length - text.num_context for text in texts)
    print(
        f"{len(texts)} texts of {lengths[0]} to {lengths[-1]} positions, {learned} of them learned per pass; ", end=""
    )
    print(f"{options.threads} threads; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    packed = steps(list(fill(texts, options.part_rows, LONGEST)), options.rows)
    # One text at a time makes optimizer steps after the same texts as packing does.
    singly = [[[example] for part in step for example in part] for step in packed]
    filled = [padded([example for part in step for example in part], options.part_rows) for step in packed]
    ways = {
        "packed": Way(trainer(), packed),
        "packed, as with --evolve idle": Way(trainer(between=stand_by.wait), packed),
        "packed, operations shared": Way(trainer(1), packed, cores=options.threads),
        "padded": Way(trainer(), filled),
        "one text at a time": Way(trainer(), singly),
    }
    report_speed(ways, learned, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        report_stalls(ways["packed"].trainer, target, texts[:4], Path(folder), options.rounds)


def read_texts(target: Target, count: int) -> list[Example]:
    """First questions of real conversations and their answers, with the target's features."""
    tokenizer = load_tokenizer(locate("default"))
    recompute = target.recompute()
    found: list[Example] = []
    with ShareGPT() as dataset:
        for _, conversation in dataset.conversations():
            turns = [turn.text for turn in conversation.turns[:2]]
            if len(turns) < 2 or not all(map(is_mostly_ascii, turns)):
                continue
            prompt, answer = (tokenizer.encode(turn, add_special_tokens=False) for turn in turns)
            if 5 <= len(prompt) <= 300 and 16 <= len(answer) <= LONGEST - 300:
                tokens = np.array(prompt + answer, np.int32)
                found.append(Example(tokens, len(prompt), 0, recompute.features(tokens)))
            if len(found) == count:
                break
    return found


def padded(examples: Sequence[Example], rows: int) -> Parts:
    """Parts of texts that are filled up to the longest among them."""
    parts: Parts = []
    for example in examples:
        if parts and (len(parts[-1]) + 1) * max(each.length for each in [*parts[-1], example]) <= rows:
            parts[-1].append(example)
        else:
            parts.append([example])
    return [[pad(example, max(each.length for each in part)) for example in part] for part in parts]


def pad(example: Example, length: int) -> Example:
    missing = length - example.length
    features = example.features[: example.length]
    return replace(
        example,
        tokens=np.concatenate((example.tokens, np.zeros(missing, np.int32))),
        features=torch.cat((features, features.new_zeros(missing, *features.shape[1:]))),
    )


def steps(parts: Parts, rows: int) -> list[Parts]:
    """Parts with about so many positions together."""
    found: list[Parts] = []
    size = rows
    for part in parts:
        length = sum(example.length for example in part)
        if size + length > rows:
            found.append([])
            size = 0
        found[-1].append(part)
        size += length
    return found


def report_speed(ways: dict[str, Way], learned: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways, *list(ways) * rounds]:
        way = ways[name]
        torch.set_num_threads(way.cores)
        began = time.perf_counter()
        for step in way.steps:
            way.trainer.learn(step)
        seconds[name].append(time.perf_counter() - began)
    torch.set_num_threads(1)
    best = statistics.median(seconds["packed"][1:])
    print("| texts | positions computed | parts | tokens/s | packed is faster by |\n|---|---|---|---|---|")
    for name, way in ways.items():
        size = sum(example.length for step in way.steps for part in step for example in part)
        count = sum(len(step) for step in way.steps)
        middle = statistics.median(seconds[name][1:])  # the first pass warms up
        print(f"| {name} | {size} | {count} | {learned / middle:.0f} | {middle / best:.2f}× |")


def report_stalls(trainer: Trainer, target: Target, texts: list[Example], folder: Path, rounds: int) -> None:
    """Between two of them a step is trained, as in the worker, so that the disk has time as it has there."""
    selective = Checkpoint(folder, "selective")

    def everything() -> None:
        state = trainer.state() | {"head": trainer.head.tensors(), "embedding": target.embedding}
        with (folder / "everything.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    ways: dict[str, Callable[[], None]] = {
        "everything, synchronous": everything,
        "trained part, synchronous": lambda: selective.save(trainer.state(), wait=True),
        "trained part, asynchronous": lambda: selective.save(trainer.state()),
    }
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for _ in range(1 + rounds):
        for name, save in ways.items():
            trainer.learn([texts])
            began = time.perf_counter()
            save()
            stalls[name].append(time.perf_counter() - began)
            selective.finish()
            file = folder / ("everything.pt" if save is everything else "selective.pt")
            sizes[name] = file.stat().st_size
    least = statistics.median(stalls["trained part, asynchronous"][1:])
    print("\n| checkpoint | MB | training waits, ms | asynchronous is shorter by |\n|---|---|---|---|")
    for name, times in stalls.items():
        middle = statistics.median(times[1:])
        print(f"| {name} | {sizes[name] / 1e6:.0f} | {middle * 1e3:.1f} | {middle / least:.1f}× |")


if __name__ == "__main__":
    main()
