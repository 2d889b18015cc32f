"""Training on another device than the CPU: everything lies there, and comes to what the CPU comes to."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from elsewhere import DEVICE, Elsewhere, There, WrongDeviceError
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.traffic.store import Sample
from slipstream.drafter.training import candidates, target
from slipstream.drafter.training.checkpoint import Checkpoint
from slipstream.drafter.training.control import Control, Report, StandBy
from slipstream.drafter.training.course import WorkerOptions
from slipstream.drafter.training.device import CPU, OWN_BYTES, Place, check_device, find_place, training_bytes
from slipstream.drafter.training.gate import score
from slipstream.drafter.training.losses import LossName
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example
from slipstream.drafter.training.trainer import Trainer, TrainOptions
from slipstream.drafter.training.worker import Worker
from slipstream.engine.errors import ConfigError
from slipstream.engine.models.config import DecoderConfig

MakeHead, MakeExample = Callable[..., TrainableHead], Callable[..., Example]
MakeSamples = Callable[..., list[Sample]]
GIB = 1 << 30


def texts_of(make_example: MakeExample, likely: bool) -> list[Example]:
    texts = [make_example(length, seed=length) for length in (30, 45, 38)]
    for text in texts:
        text.tokens[:] = text.tokens // 2 * 2  # the draft vocabulary
    if not likely:
        return texts
    return [
        Example(
            text.tokens,
            text.num_prompt,
            text.start,
            text.features,
            (text.tokens[text.num_prompt :, None], torch.full((len(text.tokens) - text.num_prompt, 1), -0.1).numpy()),
        )
        for text in texts
    ]


def moved(head: TrainableHead, target: DecoderConfig, embedding: Tensor, device: torch.device) -> TrainableHead:
    return TrainableHead(head.config, target, embedding.to(device), head.tensors(), head.dtype)


@pytest.mark.parametrize("loss", ["ce", "kl", "race"])
def test_steps_on_another_device_are_those_on_the_cpu(
    loss: LossName,
    make_head: MakeHead,
    make_example: MakeExample,
    target: DecoderConfig,
    embedding: Tensor,
    tmp_path: Path,
) -> None:
    """Bit by bit; from a checkpoint of one on the other, too. Only a part's texts cross, and little comes back."""
    texts, options = texts_of(make_example, loss != "ce"), TrainOptions(loss=loss)
    parts = [texts[:2], texts[2:]]
    here = Trainer(make_head(), options, is_cold=True)
    for _ in range(3):
        here.learn(parts)
    checkpoint = Checkpoint(tmp_path, "shared")
    with Elsewhere() as device:
        there = Trainer(moved(make_head(), target, embedding, DEVICE), options, is_cold=True)
        for _ in range(2):
            there.learn(parts)
        device.sent.clear()
        device.read.clear()
        assert there.learn(parts).tokens
        sent, read = len(device.sent), device.read.total()
        state = there.state()
        tensors = [*state["weights"].values(), *state["average"].values(), state["optimizers"][0]["state"][0]]
        assert all(isinstance(each, There) for each in tensors[:-1])
        checkpoint.save(state, wait=True)
        published = there.published()
        assert score(there.head, texts, 2).steps.tolist() == score(here.head, texts, 2).steps.tolist()
    for name, tensor in here.published().items():
        assert type(published[name]) is Tensor and torch.equal(tensor, published[name]), name
    # For each part: its texts, and where they end after each draft token; where drafts are drawn, the draws, too.
    assert sent == len(parts) * (5 + 3 if loss == "ce" else 7 + 3 + 2)
    # Where texts end among the rows that draft on, how many these are, the loss, and how many draft tokens were right;
    # and once whether the gradients are finite.
    assert read == len(parts) * (3 + 2 + 1 + 1) + 1

    resumed = Trainer(make_head(seed=3), options)
    resumed.head.weights["lm_head.weight"].copy_(here.head.weights["lm_head.weight"])
    saved = [checkpoint.load(), checkpoint.load()]
    assert saved[0] is not None and saved[1] is not None
    resumed.resume(saved[0])
    with Elsewhere():
        again = Trainer(moved(make_head(), target, embedding, DEVICE), options)
        again.resume(saved[1])
        again.learn(parts)
        published = again.published()
    for trainer in (here, resumed):
        trainer.learn(parts)
        for name, tensor in trainer.published().items():
            assert torch.equal(tensor, published[name]), name


def test_the_same_candidates_on_any_device() -> None:
    targets = [torch.randint(-1, 5000, (300,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    here = candidates.choose(targets, 5000, seed=4)
    with Elsewhere():
        there = candidates.choose([each.to(DEVICE) for each in targets], 5000, seed=4)
        assert here is not None and there is not None
        for name in ("columns", "bias", "place"):
            found = getattr(there, name)
            assert isinstance(found, There) and torch.equal(found.cpu(), getattr(here, name))


def test_what_a_gpu_forbids_is_found() -> None:
    with Elsewhere() as device:
        there = torch.ones(4, device=DEVICE)
        assert device.most_bytes == 16
        with pytest.raises(WrongDeviceError):
            there + torch.ones(4)
        with pytest.raises(WrongDeviceError):
            there[torch.arange(2)]
        with pytest.raises(RuntimeError):
            there.numpy()
        assert float((there * 2.0).sum()) == 8 and device.read.total() == 1
        assert (there + there).cpu().tolist() == [2, 2, 2, 2]


@pytest.fixture
def run_worker(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Tensor]]]:
    """Trains in this process until two versions were judged; gives what passed."""
    monkeypatch.setattr(target, "fast_dtype", lambda device: torch.float32)  # so that it is one format on both

    def run(folder: Path, place: Place) -> list[dict[str, Tensor]]:
        monkeypatch.setattr(WorkerOptions, "place", lambda options: place)
        over = threading.Event()
        told: list[Report] = []

        def report(line: Report) -> None:
            told.append(line)
            if sum(each.state in ("published", "refused") for each in told) == 2:
                worker._control.finishing = True

        def lines() -> Iterator[str]:
            over.wait()
            yield from ()

        fields = workshop.options | {"registry": str(folder), "round_tokens": 12_000, "longest": 40}
        worker = Worker(WorkerOptions(**fields), Control("always", lines(), report))
        try:
            worker.run()
        finally:
            over.set()
        assert told[-1].arithmetic or told[0].arithmetic
        versions = [each.version for each in worker._registry.list()]
        found = [worker._registry.open_version(each, workshop.fingerprint)[1] for each in versions]
        assert found, "nothing passed the gate"
        return found

    return run


def test_the_worker_on_another_device(
    workshop: Any, traffic: MakeSamples, run_worker: Any, tmp_path: Path, target_folder: Path
) -> None:
    """Rounds, gate, registry and checkpoints; within the memory that it says it takes."""
    workshop.store.append(traffic(150))
    here = run_worker(tmp_path / "here", Place())
    with Elsewhere() as device:
        there = run_worker(tmp_path / "there", Place(DEVICE))
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name
    options = WorkerOptions(**workshop.options | {"longest": 40})
    rows = options.rows  # of the first steps
    said = training_bytes(options.model, options.draft_vocab_size, options.depth, rows, rows, options.longest)
    assert said / 2 < device.most_bytes < said < options.needed()


class Gpus:
    """What torch says of some GPUs: their free memory, and all of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *memory: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(memory))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: memory[gpu])


def test_auto_goes_where_it_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, large = 4 * GIB, (80 * GIB, 80 * GIB)
    Gpus(monkeypatch)
    assert find_place("auto", needed, "auto") == Place()
    assert find_place("auto", needed) == Place()

    Gpus(monkeypatch, (8 * GIB, 80 * GIB))
    assert find_place("cpu", needed, "auto") == find_place("auto", needed, "cpu") == Place()
    same = find_place("auto", needed, "auto", 0.9, "idle")
    assert same.device == torch.device("cuda:0") and same.memory is not None
    assert needed < same.memory <= 80 * GIB * 0.1 - OWN_BYTES, "what an engine leaves, whatever is free now"
    beside = find_place("auto", needed, "auto", 0.9, "always")
    assert beside.device == CPU and "in turn" in beside.because
    assert find_place("cuda", needed, "auto", 0.9, "always").device == torch.device("cuda:0"), "it was asked for"
    small = find_place("auto", 9 * GIB, "cuda", 0.9, "idle")
    assert small.device == CPU and "cuda:0 has 6.99 GiB" in small.because and "up to 9.00 GiB" in small.because
    assert "--gpu-memory-utilization" in small.because
    with pytest.raises(ConfigError, match=r"up to 9\.00 GiB"):
        find_place("cuda", 9 * GIB, "cuda", 0.9, "idle")

    Gpus(monkeypatch, large, (3 * GIB, 80 * GIB), large)
    for mode in ("idle", "always"):
        assert find_place("auto", needed, "auto", 0.9, mode).device == torch.device("cuda:2"), mode
    assert find_place("auto", needed, "cpu").device == CPU, "the model is on the CPU: somebody wants it so"
    assert find_place("auto", needed).device == torch.device("cuda:0"), "no engine here"
    asked = find_place("cuda:1", needed, "auto")
    assert asked.device == torch.device("cuda:1") and not asked.has_room_for(0), "asked for by its number"
    assert Place().has_room_for(1 << 60) and same.has_room_for(GIB) and not same.has_room_for(4 * GIB)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"training on {name}: torch sees no GPU here"):
            check_device(name)
    Gpus(monkeypatch, (GIB, GIB))
    check_device("cuda:0")
    with pytest.raises(ConfigError, match="no GPU 1; torch sees 1, counted from 0"):
        find_place("cuda:1")


@pytest.mark.parametrize("mode", ["idle", "always"])
def test_a_gpu_is_given_little_that_requests_would_wait_for(
    mode: Literal["idle", "always"], make_head: MakeHead, make_example: MakeExample
) -> None:
    """In idle mode it is waited for before each matrix, on the way back and in the optimizer, too."""
    settled, waiting = itertools.count(), threading.Event()
    control = Control(mode, (line for _ in iter(waiting.wait, True) for line in ()), lambda report: None)
    stand_by = StandBy(control, lambda: None, lambda: next(settled))
    head = make_head()
    head.between = stand_by.wait
    options = TrainOptions()
    Trainer(head, options).learn([[make_example(40)]])
    waiting.set()
    matrices = [name for name in head.trained if head.weights[name].dim() == 2]
    at_least = 2 * options.steps * (len(matrices) - 1) + len(matrices)
    assert next(settled) >= at_least if mode == "idle" else next(settled) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_steps_on_a_gpu(
    loss: LossName, make_head: MakeHead, make_example: MakeExample, target: DecoderConfig, embedding: Tensor
) -> None:
    """Near those on the CPU in float32; and in bfloat16 it learns."""
    texts, options = texts_of(make_example, loss != "ce"), TrainOptions(loss=loss, warmup=5)
    gpu = torch.device("cuda")
    here = Trainer(make_head(), options)
    there = Trainer(moved(make_head(), target, embedding, gpu), options)
    for _ in range(10):
        expected, found = here.learn([texts]), there.learn([texts])
        assert found.loss == pytest.approx(expected.loss, rel=1e-2) and found.tokens == expected.tokens
    for name, tensor in here.published().items():
        torch.testing.assert_close(there.published()[name], tensor, rtol=1e-2, atol=1e-3)
    assert {each.device.type for each in there.head.weights.values()} == {"cuda"}
    rough = Trainer(moved(make_head(dtype=torch.bfloat16), target, embedding, gpu), options)
    first = rough.learn([texts]).loss
    for _ in range(40):
        last = rough.learn([texts])
    assert last.loss < first
    assert layout.stored(rough.published())["fc.weight"].device == CPU
    assert score(rough.head, texts, 2).steps.shape == (3, 3)
