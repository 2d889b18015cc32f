"""``slipstream drafter``: every command does in the registry what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slipstream.drafter.head import layout
from slipstream.drafter.registry.registry import Registry, default_folder
from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.models.config import decoder_config
from slipstream.server.commands.cli import app
from slipstream.server.commands.drafter import drafter_app

MODEL = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


class Cli:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: object) -> str:
        command = ["drafter", *map(str, arguments), "--registry", str(self.folder)]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A published head beside the model it is for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    config = layout.config_for(decoder_config(MODEL), 48)
    layout.write(tmp_path / "head", config, layout.random_tensors(config, 0))
    return tmp_path / "head"


@pytest.fixture
def cli(tmp_path: Path, head: Path) -> Cli:
    """With two versions imported."""
    cli = Cli(tmp_path / "registry")
    model = ("--target", tmp_path / "model", "--target-lineage", "run 7")
    first = cli.json("import", head, *model, "--note", "from afar")
    assert (first["version"], first["state"], first["manifest"]["note"]) == (1, "candidate", "from afar")
    assert "version 2 is a candidate on route tenant:acme" in cli("import", head, *model, "--route", "tenant:acme")
    return cli


def test_versions_are_listed_and_shown(cli: Cli, tmp_path: Path) -> None:
    rows = [line.split() for line in cli("list").splitlines()]
    assert next(row[:3] for row in rows if row[:1] == ["1"]) == ["1", "candidate", "imported"]
    assert [each["version"] for each in cli.json("list")] == [1, 2]
    assert [each["version"] for each in cli.json("list", "--route", "tenant:acme")] == [2]
    shown = cli.json("show", 2)
    assert shown["version"]["route"] == "tenant:acme"
    assert [event["action"] for event in shown["history"]] == ["added"]
    output = cli("show", 2)
    assert shown["version"]["manifest"]["weights_sha256"] in output
    assert "LlamaForCausalLMEagle3" in output
    assert "lineage 'run 7'" in output and "target_version 0" in output


def test_versions_are_promoted_rolled_back_pinned_and_pruned(cli: Cli, tmp_path: Path, head: Path) -> None:
    third = cli.json("import", head, "--target", tmp_path / "model", "--target-lineage", "run 7")["version"]
    assert "version 1 is live" in cli("promote", 1)
    assert cli.json("promote", third, "--reason", "looks good")["state"] == "live"
    assert "version 1 is live" in cli("rollback", "--reason", "does not")
    assert [(each["action"], each["reason"]) for each in cli.json("show", third)["history"]][1:] == [
        ("promoted", "looks good"),
        ("rolled back", "does not"),
    ]
    assert cli.json("pin", third)["pinned"]
    assert cli.json("prune", "--keep", 0) == [2]
    assert "is not pinned" in cli("unpin", third)
    assert f"pruned: {third}" in cli("prune", "--keep", 0)
    assert "nothing to prune" in cli("prune", "--keep", 0)
    assert [each["version"] for each in cli.json("list")] == [1]
    assert [each["version"] for each in cli.json("list", "--pruned")] == [1, 2, third]
    assert "no version is live" in cli("rollback")


def test_versions_are_compared_and_exported(cli: Cli, tmp_path: Path) -> None:
    difference = cli.json("diff", 1, 2)
    assert difference["fields"]["route"] == ["", "tenant:acme"]
    assert set(difference["weights"].values()) == {0.0}
    Registry(cli.folder).record_metrics(2, {"live_accept_length": 1.5})
    output = cli("diff", 1, 2)
    assert "live_accept_length" in output
    assert "0.00%" in output
    assert "version 1 is in" in cli("export", 1, tmp_path / "exported")
    config, _ = layout.read(tmp_path / "exported", decoder_config(open_checkpoint(tmp_path / "model").config))
    assert config.draft_vocab_size == 48


def test_every_command_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/evolution.md").read_text()
    names = [each.name or each.callback.__name__ for each in drafter_app.registered_commands if each.callback]
    assert len(names) >= 10
    assert [name for name in names if f"`{name}" not in page] == []


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "slipstream.server", "drafter", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "99"], "99"),
        (["promote", "99"], "99"),
        (["rollback", "--route", "nowhere"], "nowhere"),
        (["list", "--registry", "/no/such/registry"], "/no/such/registry"),
        (["prune", "--keep", "-1"], "--keep"),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_code_2(cli: Cli, arguments: list[str], said: str) -> None:
    done = run(*arguments, SLIPSTREAM_REGISTRY=str(cli.folder))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_without_a_folder_it_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "slipstream" / "drafters"
    Registry(default_folder())
    done = run("list", "--json", XDG_DATA_HOME=str(tmp_path), HOME="/nowhere")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
