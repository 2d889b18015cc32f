"""``slipstream drafter train`` and ``eval`` on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from slipstream.drafter.registry.fingerprint import traffic_target
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.testing.local import TINY_LLAMA
from slipstream.server.commands.cli import app

MODEL = TINY_LLAMA | {"num_hidden_layers": 6}
FOLLOWS = np.random.default_rng(1).permutation(96).astype(np.int32)


def text(seed: int) -> Sample:
    """Mostly the token that always follows; only tokens are kept."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 96, 40, dtype=np.int32)
    for at in range(1, 40):
        if rng.random() < 0.85:
            tokens[at] = FOLLOWS[tokens[at - 1]]
    return Sample("", "", 0, 0, time.time(), tokens, 6, 0, None, None, True)


class Cli:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._options = ["--registry", str(folder / "registry"), "--model", str(folder / "model")]

    def __call__(self, *arguments: object) -> str:
        store = ("--traffic-folder", str(self.folder / "traffic"))
        done = CliRunner().invoke(app, ["drafter", *map(str, arguments), *store, *self._options, "--threads", "1"])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))

    def train(self, *arguments: object) -> Any:
        """Until something is learned, which a machine that stands still for a moment does not do in a little time."""
        for _ in range(20):
            with contextlib.suppress(ConfigError):
                return self.json("train", *arguments)
        raise AssertionError("nothing was learned")


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    folder = tmp_path_factory.mktemp("training")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    save_file(dict(dummy_tensors(MODEL, 0)), folder / "model" / "model.safetensors")
    store = TrafficStore(folder / "traffic")
    store.append([text(number) for number in range(150)])
    store.close()
    return Cli(folder)


def test_training_ends_with_a_live_version_that_eval_finds_better_than_none(cli: Cli) -> None:
    for _ in range(20):  # each goes on where the one before ended; a busy machine learns little in one of them
        trained = cli.train("--minutes", 0.2, "--round-tokens", 20_000)
        assert trained["tokens"] > 0
        if trained["versions"]:
            break
    registry = Registry(cli.folder / "registry")
    live = registry.live()
    assert live is not None and live.version == trained["versions"][-1]["version"]
    gate = live.manifest.gate

    found = cli.json("eval", live.version)
    assert found["live"] == live.version and not found["verdict"]["passes"], "not better than itself"
    assert found["verdict"]["accept_length"] == pytest.approx(gate["accept_length"])
    assert found["accept_lengths"] == found["live_accept_lengths"]
    assert found["accept_lengths"][-1] > 1

    registry.retire(live.version)
    by_folder = cli.json("eval", registry.path(live.version))
    assert by_folder["live"] is None and by_folder["verdict"]["passes"]
    assert by_folder["accept_lengths"] == found["accept_lengths"]
    assert by_folder["live_accept_lengths"] == [1.0, 1.0, 1.0]
    output = cli("eval", live.version)
    assert "no drafter" in output and "passes the gate" in output and "3 draft tokens" in output

    again = cli.train("--minutes", 0.05, "--no-promote")
    assert again["tokens"] > 0 and registry.live() is None


def test_without_an_end_it_waits_for_traffic_and_ends_when_it_is_told(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(cli.folder / "model")
    TrafficStore(tmp_path / "traffic").close()
    checkpoint = tmp_path / "registry" / "training" / "shared.pt"

    def serve_then_stop() -> None:
        until(lambda: checkpoint.parent.exists())
        store = TrafficStore(tmp_path / "traffic")
        store.append([text(number) for number in range(100)])
        store.close()
        until(checkpoint.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    def until(happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not happened() and time.monotonic() < deadline:
            time.sleep(0.1)

    other = threading.Thread(target=serve_then_stop)
    other.start()
    trained = Cli(tmp_path).json("train", "--no-promote", "--first-tokens", 1_000, "--round-tokens", 4_000)
    other.join()
    assert trained["tokens"] > 0 and checkpoint.exists()
    assert Registry(tmp_path / "registry").live() is None


def test_what_cannot_work_is_said(cli: Cli, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no texts for tenant:nobody"):
        cli("train", "--minutes", 0.02, "--route", "tenant:nobody")
    with pytest.raises(ConfigError, match="write tenant:NAME"):
        cli("train", "--minutes", 1, "--route", "nobody")
    for command in (("train", "--minutes", 1), ("eval", 1)):
        with pytest.raises(ConfigError, match="--device gpu: write auto, cpu, cuda, or cuda:NUMBER"):
            cli(*command, "--device", "gpu")
        with pytest.raises(ConfigError, match="training on cuda:99: t"):
            cli(*command, "--device", "cuda:99")
    with pytest.raises(ConfigError, match="held-out"):
        cli("eval", 1, "--route", "tenant:nobody")
    with pytest.raises(ConfigError, match="no traffic store"):
        Cli(tmp_path)("train", "--minutes", 1)
    assert not (tmp_path / "traffic").exists()

    store = TrafficStore(tmp_path / "traffic")
    store.append([replace(text(number), target_version=3) for number in range(20)])
    model = EngineConfig(model=str(cli.folder / "model"))
    store.index.claim(traffic_target(model), "files")
    store.close()
    (tmp_path / "model").symlink_to(cli.folder / "model")
    updated = Cli(tmp_path)
    for command in (("train", "--minutes", 0.02), ("eval", cli.folder / "registry" / "versions" / "000001")):
        with pytest.raises(ConfigError, match="20 texts cannot be learned from: 20 were answered by weights that do"):
            updated(*command)
    for command in ("train", "--minutes", 0.02), ("eval", 1):
        with pytest.raises(ConfigError, match="traffic of another model, or of another lineage"):
            updated(*command, "--target-lineage", "run 7")
