"""The command line: options from the configuration, errors of the user in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.server import __main__ as entry
from slipstream.server.commands.cli import app, build
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.launch import listen, unknown_settings
from slipstream.server.testing import Commands

EVOLVE = (
    "serve",
    "--evolve",
    "idle",
    "--registry",
    "/dev/null/x",
    "--traffic-log",
    "tokens",
    "--traffic-folder",
    "/dev/null/x",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "slipstream.server", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", **environment},
    )


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with contextlib.closing(Commands()) as commands:
        yield commands


def test_version() -> None:
    root = Path(__file__).parents[3]
    said = version("slipstream")
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
        said += f" (commit {head.stdout.strip()})"
    for arguments in (["version"], ["--version"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout.strip()) == (0, said)


def test_serve_has_an_option_for_every_field() -> None:
    done = run("serve", "--help", TERMINAL_WIDTH="200")
    assert done.returncode == 0
    for config in (ServerConfig, EngineConfig, TrafficConfig, EvolutionConfig):
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--model", "/no/such/model"], "/no/such/model"),
        (["serve", "--device", "abacus"], "abacus"),
        (["serve", "--port", "many"], "--port"),
        (["serve", "my-model"], "(my-model); the model is an option here: --model"),
        (["serve", "--port", "99999"], "port"),
        (["serve", "--host", "192.0.2.1"], "192.0.2.1"),
        (["serve", "--max-n", "0"], "--max-n"),
        (["serve", "--health-stall-s", "nan"], "--health-stall-s"),
        (["serve", "--step-latency-ms", "nan"], "--step-latency-ms"),
        (["drafter", "train", "--minutes", "nan", "--traffic-folder", "/tmp"], "--minutes"),
        (["demo", "--port", "99999"], "--port"),
        ([*EVOLVE, "--evolve-route", "acme"], "--evolve-route acme: write tenant:NAME or domain:NAME"),
        ([*EVOLVE, "--evolve-route", "tenant:a", "--max-drafters", "2"], "--max-drafters 2 is not enough for 1"),
        (["serve", "--api-key", ""], "--api-key"),
        (["serve", "--no-such-option"], "--no-such-option"),
        (["serve", "--chat-template", "/no/such/file"], "/no/such/file"),
        (["serve", "--kv-cache-memory", "plenty"], "plenty"),
        (["serve", "--max-draft-tokens", "0"], "--max-draft-tokens"),
        (["serve", "--max-running", "-3"], "--max-running"),
        (["serve", "--drafter", "/no/such/head"], "/no/such/head"),
        (["serve", "--draft-model", "/no/such/draft"], "/no/such/draft"),
        (["serve", "--speculation", "ngram,telepathy"], "telepathy"),
        (["serve", "--evolve-device", "gpu"], "--evolve-device gpu: write auto, cpu, cuda, or cuda:NUMBER"),
        ([*EVOLVE, "--evolve-device", "cuda:99"], "--evolve-device: training on cuda:99: t"),
        (["serve", "--batch-folder", ""], "--batch-folder"),
        (["serve", "--host", " "], "--host"),
        (["serve", "--host", "[::1]"], "cannot listen on [::1] port 0: Name"),
        (["serve", "--threads", "1000000"], "--threads 1000000: must be from 0 to"),
        (["serve", "--max-model-len", "1"], "--max-model-len 1: must leave room"),
        (["serve", "--keys-file", "/dev/zero"], "--keys-file /dev/zero: it is larger than 16 MiB"),
        (
            ["serve", "--chat-template", "/dev/zero"],
            "cannot read '/dev/zero': it is larger than 16 MiB",
        ),
        (["dance"], "dance"),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_code_2(commands: Commands, arguments: list[str], said: str) -> None:
    done = commands.run(*arguments, SLIPSTREAM_PORT="0")
    errors = [line for line in done.stderr.splitlines() if line.startswith("slipstream: ")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr


def test_only_serve_has_the_model_as_an_option(commands: Commands) -> None:
    assert "--model" not in commands.run("drafter", "list", "here").stderr


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "Address already in use; see --host and --port" in done.stderr


def test_ctrl_c_before_anything_is_imported_shows_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "EarlyProcess", interrupted)
    monkeypatch.setattr(sys, "argv", ["slipstream", "serve"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130


@pytest.mark.parametrize("asked", ["fp8_e5m2", "int4"])
def test_formats_that_there_are_not_are_refused_with_those_that_there_are(asked: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--kv-cache-dtype", asked])
    assert done.exit_code == 2
    assert all(word in done.output for word in (asked, "is not one of", "int8", "fp8_e4m3"))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_every_interface_is_listened_on_for_both_kinds_of_addresses() -> None:
    with listen("::", 0) as listener:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, listener.getsockname()[1])).close()


def test_broken_model(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00")
    done = commands.run("serve", "--port", "0", "--model", str(tmp_path / "broken.gguf"))
    assert done.returncode == 2
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_tokenizer_and_one_that_does_not_fit(commands: Commands, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 1 << 16, "intermediate_size": 1 << 18, "num_hidden_layers": 200}
    config |= {"num_attention_heads": 512, "vocab_size": 1000, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    serve = ("serve", "--port", "0", "--model", str(tmp_path), "--load-format", "dummy")
    done = commands.run(*serve)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    done = commands.run(*serve)
    assert done.returncode == 2
    assert "does not fit" in done.stderr
    assert "Traceback" not in done.stderr


def test_environment_sets_options(commands: Commands) -> None:
    done = commands.run("serve", SLIPSTREAM_MODEL="/from/the/environment")
    assert done.returncode == 2
    assert "/from/the/environment" in done.stderr


@pytest.mark.parametrize("name", ["SLIPSTREAM_API_KEY", "SLIPSTREAM_ADMIN_KEY", "SLIPSTREAM_KEYS_FILE"])
def test_keys_that_were_not_filled_in_open_no_server(commands: Commands, name: str) -> None:
    """Elsewhere a variable without content is one that is not set."""
    for content in ("", "  "):
        done = commands.run("serve", SLIPSTREAM_MODEL="/no/such", SLIPSTREAM_BATCH_FOLDER="", **{name: content})
        assert done.returncode == 2 and "empty" in done.stderr and "/no/such" not in done.stderr
    assert "/no/such" in commands.run("serve", SLIPSTREAM_MODEL="/no/such", SLIPSTREAM_BATCH_FOLDER="").stderr


def test_settings_of_the_environment_that_are_no_options_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    links = ("SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT_8000_TCP_ADDR", "GPU_SERVICE_PORT", "GPU_PORT")
    for name in ("API_KEYS", "MAX_RUNING", "ELSE_WHERE", "MAX_RUNNING", "IMAGE", *links):
        monkeypatch.setenv(f"SLIPSTREAM_{name}", "x")
    monkeypatch.delenv("SLIPSTREAM_PORT", raising=False)
    found = dict(unknown_settings(ServerConfig(), EngineConfig(), TrafficConfig(), EvolutionConfig()))
    assert {name: found[name] for name in sorted(found)} == {
        "SLIPSTREAM_API_KEYS": "SLIPSTREAM_API_KEY",
        "SLIPSTREAM_ELSE_WHERE": None,
        "SLIPSTREAM_MAX_RUNING": "SLIPSTREAM_MAX_RUNNING",
    }


def test_what_kubernetes_says_of_a_service_is_no_option(commands: Commands) -> None:
    done = commands.run("serve", SLIPSTREAM_PORT="tcp://10.96.0.12:8000", SLIPSTREAM_MODEL="/from/the/environment")
    assert "/from/the/environment" in done.stderr and "tcp:" not in done.stderr


def test_defaults_of_options_are_those_of_the_configuration() -> None:
    values = {field.name: field.default for field in dataclasses.fields(ServerConfig)}
    assert build(ServerConfig, values | {"api_key": ["a", "b"]}) == ServerConfig(api_key=("a", "b"))


@pytest.mark.parametrize("wrong", [{"max_body_bytes": 0}, {"max_logprobs": -2}, {"drain_timeout_s": -1.0}])
def test_wrong_values_name_the_option(wrong: dict[str, float]) -> None:
    [name] = wrong
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        ServerConfig(**wrong)  # type: ignore[arg-type]


def test_the_api_process_needs_neither_torch_nor_transformers_nor_tables() -> None:
    modules = "slipstream.server.commands.cli, slipstream.server.launch"
    code = f"import sys, {modules}; print({{'torch', 'transformers', 'rich'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
