"""Engines in this process, and how fast they decode."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import LoadAdapter
from slipstream.engine.sleeping import give_back
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.engine.testing.lora import random_lora, write_lora
from slipstream.server.gpu_check.context import Context

WARM_UP = 5
"""Steps that are not measured."""


def config(context: Context, model: Path | str, **options: Any) -> EngineConfig:
    """As a server has it on this device, but without drafters and cached beginnings unless asked for."""
    defaults: dict[str, Any] = {"model": str(model), "device": context.device.type, "prefix_caching": False}
    defaults |= {"speculation": "off", "max_step_tokens": 2048 if context.on_gpu else 128}
    defaults |= {"kv_cache_memory": "2GiB"}  # not all that there is: a trainer may compute beside it
    if context.dry_run:
        defaults |= {"dtype": "float32", "kv_cache_memory": "64MiB", "threads": 1}
    return EngineConfig(**(defaults | options))


@contextmanager
def engine(options: EngineConfig) -> Iterator[LocalEngine]:
    """What it takes of the device is there again for the next one, whoever still holds what is given here."""
    give_back()
    local = LocalEngine(options, make_drafters(options) if options.speculation != "off" else ())
    try:
        yield local
    finally:
        local.close()
        del local.engine
        give_back()


def load_loras(context: Context, local: LocalEngine, names: Sequence[str], size: float) -> None:
    """Random LoRAs for all matrices of layers, of rank 16 and 5 in turn; ``size`` as for ``random_lora``."""
    decoder = local.engine.loaded.model.decoder
    assert decoder is not None
    for seed, name in enumerate(names):
        lora = random_lora(decoder.weight_shapes, (16, 5)[seed % 2], seed, size)
        local.operate(LoadAdapter(name, str(write_lora(context.scratch / "loras" / name, lora))))


def prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(1, vocab, (count, length)).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast tokens came while all streams decoded."""

    tokens: int
    steps: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.steps


def synchronize(local: LocalEngine) -> None:
    """Nothing is under way any more."""
    local.engine.core.drain()
    if local.engine.runner.cache.device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def decoding(
    local: LocalEngine,
    texts: Sequence[Sequence[int]],
    most_tokens: int,
    most_s: float,
    adapters: Sequence[str] = ("",),
) -> Iterator[list[Completion]]:
    """Streams that all decode, after some steps of that, with ``adapters`` in turn; they are broken off in the end.

    Raises TimeoutError where they are not so far after ``most_s`` seconds.
    """
    ends = time.monotonic() + most_s
    params = SamplingParams(max_tokens=most_tokens, temperature=0.0)
    streams = [
        local.submit(text, params, adapter=adapter) for text, adapter in zip(texts, cycle(adapters), strict=False)
    ]
    try:
        while not all(stream.deltas for stream in streams):
            if time.monotonic() > ends:
                raise TimeoutError(f"the prompts of {len(texts)} streams took longer than {most_s:.0f} s")
            local.step()
        for _ in range(WARM_UP):
            local.step()
        synchronize(local)
        yield streams
    finally:
        local.engine.core.drain()
        local.engine.scheduler.abort([stream.request_id for stream in streams])
        local.finish()


def measure(local: LocalEngine, streams: Sequence[Completion], steps: int, most_s: float) -> Speed:
    """So many steps, or as many as fit into the time."""

    def count() -> int:
        return sum(len(stream.tokens) for stream in streams)

    before, done, began = count(), 0, time.perf_counter()
    while done < steps and (done == 0 or time.perf_counter() - began < most_s):
        local.step()
        done += 1
    synchronize(local)
    seconds = time.perf_counter() - began
    ended = [stream for stream in streams if stream.finish_reason]
    if ended:
        raise RuntimeError(f"{len(ended)} streams ended while they were measured: {ended[0].finish_reason}")
    return Speed(count() - before, done, seconds)
