"""Where training computes: on the CPU or on a GPU, what it may take of that one's memory, and why.

``python -m slipstream.drafter.training.device NAME`` says whether there is such a device: for a server, whose own
process has no torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from slipstream.drafter.head import layout
from slipstream.drafter.head.config import OUTPUT
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.errors import ConfigError, SlipstreamError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.units import human_size
from slipstream.kernels.machine import describe_speed

CPU = torch.device("cpu")
SERVES = 0
"""The GPU that an engine serves on: the first one that its process sees."""
KEPT_FREE = 0.1
"""Share of a GPU's free memory that is left alone."""
OWN_BYTES = 1 << 30
"""What this process takes of a GPU besides tensors: its context, and the libraries there."""
HEADS = 2
"""Heads besides the one in training, while the gate scores: what came of it, and what is live."""


@dataclass(frozen=True, slots=True)
class Place:
    device: torch.device = CPU
    memory: int | None = None
    """Bytes of tensors that may lie there; None: as many as the machine has."""
    needed: int = 0
    """Bytes of these that training needs at most."""
    because: str = ""
    """Why it is not a GPU, where one was thought of."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes fit there besides training."""
        return self.memory is None or self.needed + size <= self.memory

    def enter(self) -> None:
        """Makes the device this thread's, and its share of the memory the most that this process gets of it."""
        if self.device.type == "cuda" and self.memory is not None:
            torch.cuda.set_device(self.device)
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(self.memory / total, 1.0), self.device)

    def settle(self) -> None:
        """Returns when everything that was given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe(self, dtype: torch.dtype) -> str:
        """What it computes in and where, for people."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return (
                f"{str(dtype).removeprefix('torch.')} on {self.device} ({name}), at most {human_size(self.memory or 0)}"
            )
        return describe_speed(dtype) + (f"; not on a GPU: {self.because}" if self.because else "")


def find_place(
    asked: str,
    needed: int = 0,
    engine: str | None = None,
    utilization: float = 0.9,
    mode: Literal["idle", "always"] = "always",
) -> Place:
    """Where training computes if ``asked`` is "auto", "cpu", "cuda", or "cuda:1", say. Raises ConfigError.

    Args:
        needed: bytes of a GPU's memory that training takes at most; only a GPU that was asked for by its number need
            not have them.
        engine: what its option ``device`` says, if one serves on this machine; it takes ``utilization`` of its GPU.
        mode: of training. Beside requests it would take turns with them on one GPU, which knows no priority between
            processes, so ``auto`` never has it do that.
    """
    check_device(asked)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and asked != "cpu" else 0
    serves_there = engine in ("auto", "cuda")
    if not gpus or (asked == "auto" and engine is not None and not serves_there):
        return Place()

    def room(gpu: int) -> int:
        free, total = torch.cuda.mem_get_info(gpu)
        left = int(free * (1 - KEPT_FREE))
        if serves_there and gpu == SERVES:
            # What is free now may be what the engine's next step takes.
            left = min(left, int((1 - utilization) * total) - OWN_BYTES)
        return max(left, 0)

    if asked.startswith("cuda:"):
        gpu = int(asked.partition(":")[2])
        return Place(torch.device("cuda", gpu), room(gpu), needed)
    why = []
    for gpu in sorted(range(gpus), key=lambda gpu: serves_there and gpu == SERVES):
        if asked == "auto" and mode == "always" and serves_there and gpu == SERVES:
            why.append(f"cuda:{gpu} serves, and would compute for training and for requests in turn")
            continue
        memory = room(gpu)
        if memory >= needed:
            return Place(torch.device("cuda", gpu), memory, needed)
        lower = ", which a lower --gpu-memory-utilization makes more" if serves_there and gpu == SERVES else ""
        why.append(f"cuda:{gpu} has {human_size(memory)} for training, which takes up to {human_size(needed)}{lower}")
    if asked == "cuda":
        raise ConfigError(f"no GPU for training: {'; '.join(why)}")
    return Place(because="; ".join(why))


def check_device(asked: str) -> None:
    """Raises ConfigError if there is no such device; ``auto`` and ``cpu`` there always are."""
    if not asked.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"training on {asked}: torch sees no GPU here")
    if asked != "cuda" and (gpu := int(asked.partition(":")[2])) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"training on {asked}: there is no GPU {gpu}; torch sees {count}, counted from 0")


def training_bytes(model: str, draft_vocab_size: int, depth: int, rows: int, part_rows: int, longest: int) -> int:
    """Bytes of tensors that training a head of the model's default sizes takes at most, the gate included.

    Texts have up to ``longest`` positions, parts of a step ``part_rows`` or a text, and a step ``rows``. Raises
    ModelError.
    """
    config = decoder_config(open_checkpoint(model).config)
    head = layout.config_for(config, draft_vocab_size)
    sizes = {name: math.prod(shape) for name, shape in head.shapes.items() if name not in ("d2t", "t2d")}
    output = sizes.pop(OUTPUT)
    trained, largest = sum(sizes.values()), max(sizes.values())
    parts = max(rows // part_rows, 1)
    embedding = head.vocab_size * head.hidden * 2
    tables = (HEADS + 1) * (16 * head.vocab_size + 4 * config.shape.max_positions * head.head_dim)
    # Weights, their average, momentum and gradient in float32; two copies to compute with, while one takes the other's
    # place; gradients of every part. Rows of the output matrix are only computed with.
    state = trained * (16 + 4 + 2 * parts) + 2 * output + largest * max(4 * (parts + 1), 16)
    compared = HEADS * (6 * trained + 2 * output)
    # Kept for the backward pass by each draft token's step: scores of attention, states, the layer's inside, logits.
    per_row = head.heads * longest * 16 + head.hidden * 60 + head.intermediate * 16 + head.draft_vocab_size * 24
    at_once = max(part_rows, longest)
    return embedding + tables + state + compared + at_once * (depth * per_row + len(head.taps) * head.hidden * 8)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, a GPU without room is a ConfigError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory is not enough for training ({str(error).partition('. ')[0]}): leave more free, beside "
            "an engine by a lower --gpu-memory-utilization, or train on the CPU"
        ) from None


if __name__ == "__main__":
    try:
        check_device(sys.argv[1])
    except SlipstreamError as error:
        sys.exit(str(error))
