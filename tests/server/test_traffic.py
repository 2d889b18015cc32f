"""Consent over HTTP: what the server and the request allow is kept, and nothing else reaches the disk."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.drafter.traffic.store import TrafficStore
from slipstream.server.testing import Commands

HOOK = """
import dataclasses

def redact(sample):
    if sample.domain == "secret":
        return None
    if sample.domain == "broken":
        raise RuntimeError("no")
    return sample
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traffic") / "store"


@pytest.fixture(scope="module")
def keeping(start_tiny: Callable[..., Any], folder: Path) -> Any:
    (folder.parent / "redact_hook.py").write_text(HOOK)
    options = ("--traffic-log", "features", "--traffic-folder", str(folder), "--traffic-topk", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder.parent))
        return start_tiny(*options, "--traffic-redact", "redact_hook:redact").wait_until_ready()


def ask(server: Any, headers: dict[str, str], prompt: Any = "The sea is", **fields: Any) -> tuple[int, Any]:
    body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}).encode()
    status, _, reply = server.request("POST", "/v1/completions", body, {"content-type": "application/json", **headers})
    return status, json.loads(reply)


def wait_for(server: Any, count: int, outcome: str = "kept") -> None:
    server.wait_until(lambda: server.metric("traffic_samples_total", outcome=outcome) >= count)


def contents(folder: Path) -> bytes:
    """The bytes of all files; read by another process, since closing SQLite's files here would let its locks go."""
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    return subprocess.run(["cat", *files], capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with contextlib.closing(Commands()) as commands:
        yield commands


def test_the_life_of_traffic(keeping: Any, folder: Path, start_tiny: Callable[..., Any], commands: Commands) -> None:
    """One story, because every part stands on the one before: levels, stop strings, redaction, purge, restart."""
    run = partial(commands.run, "traffic")
    server = keeping
    markers = {level: np.array([40, 41, 42, 43, number, number], np.int32) for number, level in enumerate(LEVELS, 100)}
    for level, marker in markers.items():
        headers = {"X-Slipstream-Traffic": level, "X-Slipstream-Domain": "songs"} if level != "default" else {}
        assert ask(server, headers, marker.tolist(), user=f"user-{level}")[0] == 200
    # What a router leaves of a request: its body.
    said = {"slipstream_traffic": "off", "slipstream_domain": "songs"}
    assert ask(server, {"X-Slipstream-Traffic": "tokens"}, user="user-off-by-metadata", metadata=said)[0] == 200
    wait_for(server, 3)
    text = contents(folder)
    assert [level for level in LEVELS if markers[level].tobytes() in text] == ["tokens", "features", "default"]
    assert b"user-off" not in text
    store = TrafficStore(folder, create=False)
    samples = {sample.tenant: sample for sample in store.samples()}
    assert samples["user-tokens"].features is None and samples["user-tokens"].domain == "songs"
    full = samples["user-default"]
    assert full.features is not None and full.features.shape == (13, 2, 64) and full.topk is not None
    assert full.topk[0].shape == (8, 2) and full.topk[0][:, 0].tolist() == full.tokens[6:].tolist()

    # A stop string ends the request like any other; a client that leaves, leaves nothing.
    stopped = ask(server, {}, [50, 51, 52], user="stopper", stop=["e"], max_tokens=200)[1]
    assert stopped["choices"][0]["stop_reason"] == "e"
    with server.open_stream(user="leaver", max_tokens=30_000):  # however late it leaves
        pass
    server.wait_until_idle()
    wait_for(server, 4)
    assert ask(server, {"X-Slipstream-Domain": "secret"}, user="redacted")[0] == 200
    assert ask(server, {"X-Slipstream-Domain": "broken"}, user="broken")[0] == 200
    wait_for(server, 1, "redacted")
    wait_for(server, 1, "dropped")
    assert {sample.tenant for sample in store.samples()} == {*(f"user-{level}" for level in LEVELS[1:]), "stopper"}
    assert server.metric("traffic_store_tokens") == sum(entry.tokens for entry in store.statistics().values())
    assert server.metric("traffic_store_bytes") == sum(entry.bytes for entry in store.statistics().values())

    found = json.loads(run("stats", "--folder", str(folder), "--json").stdout)
    assert found["user-default"]["samples"] == 1 and found["user-default"]["tokens"] == 14
    table = run("stats", "--folder", str(folder))
    assert "user-default" in table.stdout and table.returncode == 0

    done = run("purge", "--tenant", "user-default", "--folder", str(folder), "--json")
    assert json.loads(done.stdout) == {"purged_samples": 1}
    assert markers["default"].tobytes() not in contents(folder) and b"user-default" not in contents(folder)
    assert markers["features"].tobytes() in contents(folder)
    assert server.stop() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder.parent))
        opt_in = ("--traffic-log", "tokens", "--traffic-folder", str(folder), "--traffic-consent", "opt-in")
        again = start_tiny(*opt_in).wait_until_ready()
    again.wait_until(lambda: again.metric("traffic_store_tokens") > 0)
    assert markers["default"].tobytes() not in contents(folder)
    assert ask(again, {"X-Slipstream-Traffic": "features"}, [60, 61, 62], user="lowered")[0] == 200
    assert ask(again, {}, [63, 64, 65], user="silent")[0] == 200
    metadata = {"slipstream_traffic": "tokens", "slipstream_domain": "songs", "slipstream_tenant": "willing"}
    assert ask(again, {}, [66, 67, 68], metadata=metadata)[0] == 200
    wait_for(again, 2)
    assert [sample.domain for sample in store.samples(tenant="willing")] == ["songs"]
    assert not list(store.samples(tenant="silent"))
    [lowered] = store.samples(tenant="lowered")
    assert lowered.features is None, "a request cannot ask for more than the server keeps"
    assert run("purge", "--all", "--folder", str(folder)).stdout.startswith("deleted ")
    assert not list(store.samples()) and not list((folder / "shards").iterdir())
    store.close()
    assert again.stop() == 0


LEVELS = ("off", "tokens", "features", "default")


def test_headers_that_mean_nothing_are_refused_by_name(server: Any) -> None:
    for name, value in (
        ("X-Slipstream-Traffic", "some"),
        ("X-Slipstream-Domain", "a b"),
        ("X-Slipstream-Domain", "x" * 65),
    ):
        status, reply = ask(server, {name: value})
        assert status == 400 and reply["error"]["param"] == name and name in reply["error"]["message"]
    assert ask(server, {"X-Slipstream-Traffic": "FEATURES", "X-Slipstream-Domain": "code/python"})[0] == 200


def test_by_default_nothing_is_kept(server: Any) -> None:
    assert ask(server, {"X-Slipstream-Traffic": "features"})[0] == 200
    server.wait_until_idle()
    for outcome in ("kept", "dropped", "redacted"):
        assert server.metric("traffic_samples_total", outcome=outcome) == 0


def test_wrong_options_are_one_line(commands: Commands, tmp_path: Path) -> None:
    tokens = ["--traffic-log", "tokens"]
    for options, said in (
        (tokens, "--traffic-folder"),
        ([*tokens, "--traffic-folder", f"{tmp_path}/t", "--traffic-topk", "2"], "--traffic-topk"),
        ([*tokens, "--traffic-folder", f"{tmp_path}/t", "--traffic-max-age", "long"], "--traffic-max-age"),
        ([*tokens, "--traffic-folder", f"{tmp_path}/t", "--traffic-max-bytes", "few"], "--traffic-max-bytes"),
        ([*tokens, "--traffic-folder", f"{tmp_path}/t", "--traffic-redact", "no.such:hook"], "no.such"),
        ([*tokens, "--traffic-folder", "/usr/bin"], "/usr/bin"),
    ):
        done = commands.run("serve", "--port", "0", *options)
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("slipstream: ") and said in last
        assert "Traceback" not in done.stderr


def test_commands_say_what_is_wrong(commands: Commands, tmp_path: Path) -> None:
    run = partial(commands.run, "traffic")
    for arguments in (["stats", "--folder", str(tmp_path)], ["purge", "--folder", str(tmp_path), "--all"]):
        done = run(*arguments)
        assert done.returncode == 2 and "no traffic store" in done.stderr
    assert run("purge", "--folder", str(tmp_path)).returncode == 2
