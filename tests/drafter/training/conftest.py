"""A small target, heads for it, and traffic with structure to learn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.registry.fingerprint import target_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import Version
from slipstream.drafter.traffic.recompute import Recompute
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.models.loader import build_model, find_device
from slipstream.engine.testing.local import TINY_LLAMA, policy, write_policy
from slipstream.kernels.compute import Formats
from tests.forking import Forks

VOCAB, HIDDEN = 96, 64
TARGET = TINY_LLAMA | {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 8}
MakeHead = Callable[..., TrainableHead]
MakeExample = Callable[..., Example]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The sizes of these tests are not worth a second thread, least of all on a loaded machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target() -> DecoderConfig:
    return decoder_config(TARGET)


@pytest.fixture(scope="session")
def embedding() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_head(target: DecoderConfig, embedding: Tensor) -> MakeHead:
    def make(
        seed: int = 0, vocab: int = 48, dtype: torch.dtype = torch.float32, backwards: bool = False
    ) -> TrainableHead:
        config = layout.config_for(target, vocab)
        tensors = layout.random_tensors(config, seed)
        draft = torch.arange(vocab) * 2
        tensors["d2t"] = draft - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, draft, True)
        tensors = {name: tensor * 4 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        if backwards:
            tensors = dict(reversed(tensors.items()))
        return TrainableHead(config, target, embedding, tensors, dtype)

    return make


@pytest.fixture(scope="session")
def make_example() -> MakeExample:
    def make(length: int = 30, num_prompt: int = 6, start: int = 0, seed: int = 0) -> Example:
        rng = np.random.default_rng((seed, length))
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        # Features tell the token after the next one, so that there is something to learn.
        features = torch.randn(VOCAB, 3, HIDDEN, generator=torch.Generator().manual_seed(2))
        shown = np.concatenate((tokens[2:], tokens[:1]))[start : length - 1]
        return Example(tokens, num_prompt, start, features[torch.from_numpy(shown).long()])

    return make


def chains(count: int, length: int, vocab: int, seed: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Texts in which most tokens follow from the one before."""
    rng = np.random.default_rng(seed)
    after = np.random.default_rng(1).permutation(vocab)
    texts = []
    for _ in range(count):
        tokens = [int(rng.integers(vocab))]
        while len(tokens) < length:
            tokens.append(int(after[tokens[-1]]) if rng.random() < 0.95 else int(rng.integers(vocab)))
        texts.append(np.array(tokens, np.int32))
    return texts


class Traffic:
    """Makes samples with the features that the target has for them."""

    def __init__(self, target: Path) -> None:
        checkpoint = open_checkpoint(str(target))
        options = EngineConfig(model=str(target))
        model = build_model(checkpoint, options, Formats.of(torch.bfloat16), find_device(options), 256)
        self._vocab = checkpoint.config["vocab_size"]
        self._recompute = Recompute(model, layout.default_taps(checkpoint.config["num_hidden_layers"]), 256)

    def __call__(
        self, count: int, length: int = 40, features: bool = True, seed: int = 0, **fields: Any
    ) -> list[Sample]:
        plain = Sample("", "", 0, 0, time.time(), np.zeros(0, np.int32), 6, 0, None, None, True)
        return [
            dataclasses.replace(
                plain,
                tokens=tokens,
                features=self._recompute.features(tokens) if features else None,
                taps=self._recompute.taps if features else (),
                **fields,
            )
            for tokens in chains(count, length, self._vocab, seed)
        ]


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target as files, with weights."""
    return write_policy(tmp_path_factory.mktemp("training-target"), policy(0, TARGET, 8), TARGET)


@pytest.fixture(scope="session")
def traffic(target_folder: Path) -> Traffic:
    return Traffic(target_folder)


WORKER = """
import sys
from slipstream.drafter.training import worker
worker.POLL_SECONDS, worker.REPORT_SECONDS = 0.1, 0.1  # here everybody waits for what it says
sys.exit(worker.main(sys.argv[1:]))
"""
SECONDS = 600.0
"""More than anything takes here, on a slow and busy machine too."""
Report = dict[str, Any]
MakeSamples = Callable[..., list[Sample]]


class Process:
    def __init__(self, forks: Forks, options: dict[str, Any]) -> None:
        self.process = forks.start(WORKER, json.dumps(options))
        self._reports: queue.Queue[Report] = queue.Queue()
        self._threads = [threading.Thread(target=self._read, daemon=True)]
        self.errors = ""
        self._threads.append(threading.Thread(target=self._read_errors, daemon=True))
        for thread in self._threads:
            thread.start()

    def say(self, kind: str, **fields: Any) -> None:
        self.process.stdin.write(json.dumps({"type": kind, **fields}) + "\n")

    def wait_for(self, *states: str, **fields: Any) -> Report:
        """The next report of one of these states, with these fields."""
        end = time.monotonic() + SECONDS
        while (left := end - time.monotonic()) > 0:
            try:
                report = self._reports.get(timeout=min(left, 0.2))
            except queue.Empty:
                assert self.process.poll() is None, f"the worker ended: {self.errors}"
                continue
            if report["state"] in states and all(report.get(name) == value for name, value in fields.items()):
                return report
            assert report["state"] != "failed", report
        raise AssertionError(f"no report of {states}; {self.errors}")

    def reports(self) -> list[Report]:
        """All that came since."""
        found = []
        while not self._reports.empty():
            found.append(self._reports.get())
        return found

    def end(self) -> int:
        """By the end of its input, as when the server ends."""
        self.process.stdin.close()
        code = self.process.wait(SECONDS)
        self._close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self._close()

    def _close(self) -> None:
        for thread in self._threads:
            thread.join(SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._reports.put(json.loads(line))

    def _read_errors(self) -> None:
        self.errors = self.process.stderr.read()


class Workshop:
    """A store, a registry, and workers between them."""

    def __init__(self, folder: Path, target: Path, forks: Forks) -> None:
        self._forks = forks
        self.store = TrafficStore(folder / "traffic")
        self.registry = Registry(folder / "registry")
        self.fingerprint = target_fingerprint(open_checkpoint(str(target)))
        self.options = {
            "model": str(target),
            "traffic": str(folder / "traffic"),
            "registry": str(folder / "registry"),
            "mode": "always",
            "draft_vocab_size": 64,
            "first_tokens": 1000,
            "round_tokens": 80_000,  # the first two are a quarter of that
            "epochs": 1e6,
            "rows": 256,
            "part_rows": 128,
            "gate_texts": 40,
            "threads": 1,
            "learning_rate": 5e-3,
            "checkpoint_steps": 5,
        }
        self.workers: list[Process] = []

    def start(self, **options: Any) -> Process:
        self.workers.append(Process(self._forks, self.options | options))
        return self.workers[-1]

    def checkpoint(self, name: str = "shared") -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while (state := Checkpoint(self.registry.folder / "training", name).load()) is None:
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.01)
        return state

    def train_first(self, worker: Process) -> Version:
        """The first version that passes, made live."""
        number = worker.wait_for("published")["version"]
        return self.registry.promote(number)


@contextlib.contextmanager
def opened(folder: Path, target: Path, forks: Forks) -> Iterator[Workshop]:
    workshop = Workshop(folder, target, forks)
    try:
        yield workshop
    finally:
        for worker in workshop.workers:
            if worker.process.poll() is None:
                worker.kill()
        workshop.store.close()


@pytest.fixture
def workshop(tmp_path: Path, target_folder: Path, forks: Forks) -> Iterator[Workshop]:
    with opened(tmp_path, target_folder, forks) as workshop:
        yield workshop


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, target_folder: Path, traffic: MakeSamples, forks: Forks) -> Path:
    """The folder of a workshop with a live version, a candidate that is better, and a checkpoint after it."""
    folder = tmp_path_factory.mktemp("trained")
    with opened(folder, target_folder, forks) as workshop:
        workshop.store.append(traffic(150))
        worker = workshop.start()
        workshop.train_first(worker)
        worker.wait_for("published")
        assert worker.end() == 0
    return folder


@pytest.fixture
def experienced(trained: Path, tmp_path: Path, target_folder: Path, forks: Forks) -> Iterator[Workshop]:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "trained")
    with opened(tmp_path / "trained", target_folder, forks) as workshop:
        yield workshop
