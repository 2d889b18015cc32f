"""A tiny target, samples made by hand, and an engine with a tap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.tap import TrafficTap
from slipstream.drafter.traffic.writer import TrafficWriter
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine, policy, write_policy

TARGET = TINY_LLAMA | {"num_hidden_layers": 6, "max_position_embeddings": 512}


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("traffic-target"), policy(0, TARGET, 8), TARGET)


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    def make(length: int = 12, **fields: Any) -> Sample:
        rng = np.random.default_rng(length)
        known = {
            "tenant": "",
            "domain": "",
            "target_version": 0,
            "drafter_version": 0,
            "time": time.time(),
            "tokens": rng.integers(0, 96, length).astype(np.int32),
            "num_prompt": 5,
            "start": 2,
            "features": torch.arange((length - 3) * 3 * 4).view(-1, 3, 4).bfloat16(),
            "topk": None,
            "greedy": True,
        }
        return Sample(**(known | fields))

    return make


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, what is waiting is written at the end."""
    monkeypatch.setattr("slipstream.drafter.traffic.writer.CLOSE_S", 300.0)


GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="session")
def config_for(target: Path) -> Callable[..., EngineConfig]:
    """The configuration of an engine with the tiny target; the arguments are options."""

    def make(**options: Any) -> EngineConfig:
        given: dict[str, Any] = {"dtype": "bfloat16", "max_step_tokens": 32, "kv_cache_memory": "8MiB"}
        return EngineConfig(model=str(target), **(given | options))

    return make


class Tapped:
    """An engine with a tap, and the samples it kept."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        drafters: Sequence[Drafter] = (),
        redact: Callable[[Sample], Sample | None] | None = None,
        **tap: Any,
    ) -> None:
        self.folder = folder
        self.writer = TrafficWriter(lambda: TrafficStore(folder), redact)
        self.tap = TrafficTap(self.writer, **({"features": True} | tap))
        self.local = LocalEngine(config, drafters, [self.tap])
        self.pages = getattr(self.tap, "_pages", None)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams = GREEDY, traffic: str = "features", **more: Any
    ) -> Any:
        return self.local.submit(prompt, params, traffic=traffic, **more)

    def samples(self) -> list[Sample]:
        """After the end of the engine."""
        self.local.finish()
        self.local.close()
        assert not self.tap._recordings
        assert self.pages is None or self.pages.num_free == self.pages.num_pages, "pages are lost"
        store = TrafficStore(self.folder, create=False)
        found = list(store.samples())
        store.close()
        return found


@pytest.fixture(scope="session")
def tapped_engine() -> type[Tapped]:
    return Tapped


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """Makes prompts of these lengths."""

    def make(*lengths: int) -> list[list[int]]:
        return [np.random.default_rng(length).integers(0, 96, length).tolist() for length in lengths]

    return make
