"""The engine is killed under streams and during a swap: serving, versions and counters go on, until it is too often."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from slipstream.drafter.head import layout
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.models.config import decoder_config
from tests.server.under_way import stopped_engine

PASSED = {"least_ratio": 1.1, "accept_length": 2.0}
LONG = {"prompt": "Once upon a time", "max_tokens": 30_000, "ignore_eos": True, "speculation": {"mode": "off"}}
"""What no engine has done before it is killed."""


def test_serving_goes_on_after_deaths_of_the_engine(
    tmp_path: Path, tiny_model: Path, start_tiny: Callable[..., Any]
) -> None:
    registry, config = Registry(tmp_path), EngineConfig(model=str(tiny_model))
    shape = layout.config_for(decoder_config(open_checkpoint(tiny_model).config), 8192)
    head = shape, layout.random_tensors(shape, 0)

    def add(route: str) -> int:
        fingerprint = served_fingerprint(config)
        return registry.add(*head, target=fingerprint, origin="trained", gate=PASSED, route=route).version

    first = registry.promote(add(""), "to begin with")
    server = start_tiny(
        *("--registry", str(tmp_path), "--speculation", "head"),
        *("--canary-share", "0.5", "--max-draft-tokens", "3", "--engine-restarts", "2"),
    ).wait_until_ready()
    own, canary = add("domain:rivers"), add("")
    versions = {"": first.version, "domain:rivers": own, "canary": canary}
    server.wait_until(lambda: server.routes() == versions)
    answers = [server.chat(f"Tell me {number} facts.", max_tokens=20)["choices"] for number in range(4)]

    # Under streams.
    before = server.counters()
    with server.open_stream(**LONG) as stream, server.send("/v1/completions", LONG) as whole:
        server.wait_until(lambda: server.metric("num_requests_running") == 2)
        killed = server.engine
        killed.kill()
        next_engine = stopped_engine(server, killed.pid)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            chunk = stream.recv(65536)
            assert chunk, received[-300:]
            received += chunk
        *_, failed, done = [line for line in received.decode().splitlines() if line.startswith("data: ")]
        assert done == "data: [DONE]"
        assert json.loads(failed.removeprefix("data: "))["error"]["code"] == "engine_failed"
        head_of_answer = whole.recv(65536)
        assert head_of_answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in head_of_answer
    for path in ("/health", "/ready"):
        status, reply = server.get(path)
        assert (status, reply["status"]) == (503, "restarting")
        assert "killed by SIGKILL" in reply["reason"]
    body = json.dumps({"prompt": "x"}).encode()
    status, headers, said = server.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    assert (status, json.loads(said)["error"]["code"]) == (503, "engine_failed")
    assert int(headers["retry-after"]) > 0
    dead = server.counters()
    assert server.metric("ready") == server.metric("num_requests_running") == 0

    next_engine.resume()
    server.wait_until(lambda: server.get("/ready")[0] == 200, 240)
    alive = server.counters()
    server.wait_until(lambda: server.routes() == versions)
    again = [server.chat(f"Tell me {number} facts.", max_tokens=20)["choices"] for number in range(4)]
    assert [[choice["message"] for choice in a] for a in again] == [[c["message"] for c in a] for a in answers]
    told = server.complete("x", max_tokens=9, structured_outputs={"choice": ["yes"]})["choices"][0]["text"]
    assert told == "yes", "the new engine has to know what tokens stand for"
    for earlier, later in ((before, dead), (dead, alive), (alive, server.counters())):
        assert {series for series, value in earlier.items() if later.get(series, value) < value} == set()
    assert set(before) - {series for series in before if "drafter_version_num" in series} <= set(alive)
    assert server.metric("request_success_total", finished_reason="error") == 2
    assert server.metric("engine_restarts_total") == 1

    # During a swap: that it came to nothing is not the version's fault.
    engine = server.engine
    engine.suspend()
    newer = add("domain:rivers")
    registry.promote(newer, "by hand")
    time.sleep(2)  # the controller looks twice a second
    engine.kill()
    versions["domain:rivers"] = newer
    server.wait_until(lambda: server.routes() == versions, 240)
    states = {version.version: version.state for version in registry.list()}
    assert states == {first.version: "live", own: "retired", canary: "canary", newer: "live"}
    assert server.metric("drafter_failed_swaps_total") == 0

    # Once too often.
    server.engine.send_signal(signal.SIGSEGV)
    assert server.process.wait(300) == 3
    server._reader.join(300)
    assert "killed by SIGSEGV; giving up after 2 restarts" in server.log[-1]
    assert not psutil.pid_exists(engine.pid)
