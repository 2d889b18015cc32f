"""What an operator sees of requests: traces, logs, metrics in the forms that tools read, profiles; and nothing else."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compat_clients import CompatClient, install
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from slipstream.engine.errors import ConfigError
from slipstream.server.tracing import Tracing
from tests.server.under_way import slow_steps

pytest.importorskip("opentelemetry.sdk.trace")

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
USER, ADMIN = "Bearer user-key-SECRET", "Bearer admin-key-SECRET"
PROMPT = "PRIVATE words of a person"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
COLLECTOR = CompatClient("arize-phoenix", ("arize-phoenix==20.26.1",), "")
"""Keeps traces that come by OTLP, and tells of them over HTTP; it has an environment of its own, as clients have."""


@pytest.fixture(scope="module")
def observed(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With everything that tells something."""
    file = tmp_path_factory.mktemp("observed") / "traces.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        server = start_local(
            **{"traces": str(file), "metrics_alias": "vllm", "log_format": "json", "log_level": "debug"},
            **{"api_key": ("acme=" + USER.split()[1], "other=one"), "admin_key": (ADMIN.split()[1],)},
            **{"served_model_name": ("tiny",), "max_model_len": 8192, "request_timeout_s": 60.0},
        )
        server.file = file
        server.headers = {"authorization": USER}
        yield server


def ask(server: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    status, found, reply = server.request("POST", path, json.dumps(body).encode(), JSON | (headers or {}))
    return status, reply if "event-stream" in found["content-type"] else json.loads(reply)


def spans_in(lines: Any) -> list[dict[str, Any]]:
    """Spans of OTLP JSON, their attributes as a dictionary."""
    found = []
    for line in lines:
        for resource in json.loads(line)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    attributes = {each["key"]: value_of(each["value"]) for each in span.get("attributes", ())}
                    found.append(span | {"attributes": attributes})
    return found


def value_of(value: dict[str, Any]) -> Any:
    [(kind, content)] = value.items()
    if kind == "arrayValue":
        return [value_of(each) for each in content.get("values", ())]
    return int(content) if kind == "intValue" else content


def found_trace(server: Any, request_id: str) -> dict[str, dict[str, Any]]:
    """The spans of a request that were written so far, by name."""
    whole, _, _ = server.file.read_text().rpartition("\n")  # the last line may be half written
    spans = spans_in(whole.splitlines())
    for span in spans:
        if span["attributes"].get("slipstream.request_id") == request_id:
            return {each["name"]: each for each in spans if each["traceId"] == span["traceId"]}
    return {}


def trace_of(server: Any, request_id: str) -> dict[str, dict[str, Any]]:
    """The spans of a request, by name."""
    found: dict[str, dict[str, Any]] = server.wait_until(lambda: found_trace(server, request_id))
    return found


def test_a_request_is_a_trace_with_the_parts_of_its_time(observed: Any) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "ignore_eos": True, "user": "bob"}
    sent = {"x-request-id": "traced-1", "traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    before = time.time_ns()
    status, reply = ask(observed, CHAT, body | {"n": 2, "temperature": 0.5, "seed": 3}, sent)
    assert status == 200
    spans = trace_of(observed, "traced-1")
    assert set(spans) == {"chat tiny", "queue", "prefill", "decode"}
    root = spans.pop("chat tiny")
    assert (root["traceId"], root["parentSpanId"], root["kind"]) == (TRACE, PARENT, 2)
    assert {each["parentSpanId"] for each in spans.values()} == {root["spanId"]}
    times = [(int(each["startTimeUnixNano"]), int(each["endTimeUnixNano"])) for each in spans.values()]
    begin, end = int(root["startTimeUnixNano"]), int(root["endTimeUnixNano"])
    assert before <= begin <= end <= time.time_ns()
    assert all(begin <= first <= last <= end for first, last in times)
    found = root["attributes"]
    usage = reply["usage"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": reply["id"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "http.route": CHAT,
        "http.response.status_code": 200,
        "slipstream.tenant": "acme/bob",
        "slipstream.key": "acme",
    }
    assert {name: found[name] for name in expected} == expected
    parts = [found[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_in_model_prefill")]
    assert found["gen_ai.latency.time_to_first_token"] == pytest.approx(sum(parts), abs=0.05)


def test_traces_of_streams_of_failures_and_of_accepted_draft_tokens(observed: Any) -> None:
    body = {"prompt": [5] * 30, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    assert ask(observed, COMPLETE, body, {"x-request-id": "traced-2"})[0] == 200
    found = trace_of(observed, "traced-2")["text_completion tiny"]["attributes"]
    assert found["gen_ai.usage.output_tokens"] == 60
    assert 0 <= found["slipstream.speculation.accepted_tokens"] <= found["slipstream.speculation.draft_tokens"]

    def late(seconds: str) -> dict[str, dict[str, Any]]:
        """The trace of a request whose time was over while the engine stood still; none if it had not got there."""
        headers = {"x-request-id": f"late-{seconds}", "x-slipstream-timeout-s": seconds}
        with observed.suspended():
            assert ask(observed, COMPLETE, body, headers)[0] == 504
        assert ask(observed, COMPLETE, {"prompt": "x", "max_tokens": 1}, {"x-request-id": f"after-{seconds}"})[0] == 200
        trace_of(observed, f"after-{seconds}")  # they are written in the order in which requests end
        return found_trace(observed, f"late-{seconds}")

    root = next(filter(None, map(late, ("0.3", "3", "30"))))["text_completion tiny"]
    assert root["status"]["code"] == 2 and root["attributes"]["error.type"] == "request_timeout"
    assert root["attributes"]["gen_ai.response.finish_reasons"] == ["abort"]
    observed.wait_until_idle()


def test_a_request_that_is_not_sampled_leaves_no_trace(observed: Any) -> None:
    headers = {"x-request-id": "unseen", "traceparent": f"00-{TRACE[::-1]}-{PARENT}-00"}
    assert ask(observed, COMPLETE, {"prompt": "x", "max_tokens": 1}, headers)[0] == 200
    assert ask(observed, COMPLETE, {"prompt": "x", "max_tokens": 1}, {"x-request-id": "seen"})[0] == 200
    trace_of(observed, "seen")
    assert "unseen" not in observed.file.read_text()


WRONG: list[tuple[str, Any]] = [
    (COMPLETE, {"prompt": PROMPT, "temperature": PROMPT}),
    (COMPLETE, {"prompt": PROMPT, "max_tokens": 10**6}),
    (COMPLETE, {"prompt": PROMPT, "stop": [PROMPT], "max_tokens": 2}),
    (CHAT, {"messages": [{"role": PROMPT, "content": PROMPT}]}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "tools": [{"type": PROMPT}]}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2, "stream": True}),
    ("/tokenize", {"prompt": PROMPT * 500}),
    ("/generate", {"text": PROMPT, "sampling_params": {"max_new_tokens": 2, "regex": PROMPT + "("}}),
    (COMPLETE, PROMPT),
]


def test_no_keys_and_no_texts_are_logged_or_traced(observed: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for path, body in WRONG:
        for key in (USER, "Bearer wrong-SECRET", ADMIN):
            ask(observed, path, body, {"authorization": key})
    observed.request("POST", COMPLETE, f'{{"prompt": "{PROMPT}'.encode(), JSON)
    observed.request("GET", "/admin/v1/status", headers={"authorization": ADMIN})
    assert ask(observed, COMPLETE, {"prompt": PROMPT, "max_tokens": 1}, {"x-request-id": "last"})[0] == 200
    trace_of(observed, "last")
    assert observed.log and caplog.records
    for text in (caplog.text, "".join(observed.log), observed.file.read_text()):
        assert "PRIVATE" not in text and "SECRET" not in text


def test_records_of_a_log_are_json_and_say_which_request_they_are_about(observed: Any) -> None:
    with observed.send(
        COMPLETE, {"prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True, "request_id": "fails"}
    ):
        observed.wait_until(lambda: observed.metric("num_requests_running") == 1)

        def fail(*_: Any) -> None:
            raise RuntimeError("what a bug\nsays")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slipstream.server.generation.Sequence._push", fail)
            observed.wait_until(lambda: any("a bug" in line for line in observed.log))
    observed.wait_until_idle()
    records = [json.loads(line) for line in observed.log]
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    [record] = [record for record in records if "a bug" in record.get("exception", "")]
    assert record["request_id"] == "fails" and record["level"] == "error"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+\+00:00", record["time"])


# Metrics --------------------------------------------------------------------------------------------------------------


ASKED = [
    "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5",
    # Prometheus 2.42, and 3
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;"
    "version=0.0.4;q=0.5,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "application/openmetrics-text",
]


@pytest.mark.parametrize("accept", ASKED)
def test_openmetrics_for_who_asks_for_it(observed: Any, accept: str) -> None:
    observed.complete("x", max_tokens=2)
    status, headers, body = observed.request("GET", "/metrics", headers={"accept": accept})
    assert status == 200 and headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert families["slipstream:generation_tokens"].type == "counter"
    # Names have their colons, as everywhere: dashboards and rules ask for them. The parser above would not tell.
    samples = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert any(line.startswith("slipstream:generation_tokens_total{") for line in samples)
    assert [line for line in samples if line.startswith(("slipstream_", "vllm_")) and "_process_" not in line] == []
    assert families["slipstream:time_to_first_token_seconds"].type == "histogram"
    for plain in ("text/plain", "*/*", ""):
        _, headers, body = observed.request("GET", "/metrics", headers={"accept": plain})
        assert headers["content-type"].startswith("text/plain; version=0.0.4") and b"# EOF" not in body


def test_names_of_vllm_have_the_same_values(observed: Any) -> None:
    observed.complete("x", max_tokens=2)
    observed.wait_until_idle()
    lines = observed.get("/metrics")[1].splitlines()
    series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    found = {name.removeprefix("vllm:"): value for name, value in series.items() if name.startswith("vllm:")}
    [info] = [name for name in found if name.startswith("cache_config_info")]
    ready = observed.service.engine.ready
    assert f'block_size="{ready.block_size}"' in info and f'num_gpu_blocks="{ready.num_blocks}"' in info
    assert found.pop(info) == "1.0"
    [older] = [name for name in found if name.startswith("gpu_cache_usage_perc")]
    assert found.pop(older) == series['slipstream:kv_cache_usage_perc{model_name="tiny"}']
    assert {name: series[f"slipstream:{name}"] for name in found} == found
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "prompt_tokens_total"):
        assert f'{name}{{model_name="tiny"}}' in found


# Profiles -------------------------------------------------------------------------------------------------------------


def test_a_profile_shows_what_steps_do(observed: Any) -> None:
    admin = {"authorization": ADMIN}
    assert ask(observed, "/debug/profile", {}, {"authorization": USER})[0] == 403
    assert ask(observed, "/debug/profile", {"steps": 0}, admin)[1]["error"]["param"] == "steps"
    with slow_steps(), observed.open_stream():
        body = json.dumps({"steps": 3, "shapes": True}).encode()
        status, headers, reply = observed.request("POST", "/debug/profile", body, JSON | admin)
    assert status == 200 and int(headers["x-slipstream-steps"]) >= 3
    names = {event.get("name") for event in json.loads(reply)["traceEvents"]}
    assert {"schedule", "execute", "commit"} <= names
    observed.wait_until_idle()
    body = json.dumps({"timeout_s": 0.2}).encode()
    status, headers, _ = observed.request("POST", "/debug/profile", body, JSON | admin)
    assert (status, headers["x-slipstream-steps"]) == (200, "0"), "an idle engine has nothing to show"
    assert observed.complete("x", max_tokens=1)["usage"]["completion_tokens"] == 1


# Collectors -----------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"slipstream\[otel\]"):
        Tracing("http://127.0.0.1:4318", "tiny")


@pytest.mark.slow
def test_a_real_collector_understands_the_traces(
    start_local: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    program = install(COLLECTOR)
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        port, grpc = free.getsockname()[1], other.getsockname()[1]
    settings = {"PHOENIX_PORT": str(port), "PHOENIX_GRPC_PORT": str(grpc), "PHOENIX_HOST": "127.0.0.1"}
    settings |= {"PHOENIX_WORKING_DIR": str(tmp_path), "PHOENIX_TELEMETRY_ENABLED": "false"}
    url = f"http://127.0.0.1:{port}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (tmp_path / "log").open("wb") as log:
        command = [str(program), "-m", "phoenix.server.main", "serve"]
        collector = subprocess.Popen(command, stdout=log, stderr=log, env=inherited | settings)
    try:
        server = start_local(traces=url, served_model_name=("tiny",))
        headers = {"x-request-id": "collected", "traceparent": f"00-{TRACE}-{PARENT}-01"}

        def seen() -> dict[str, Any]:
            assert collector.poll() is None, (tmp_path / "log").read_text()
            ask(server, COMPLETE, {"prompt": "x", "max_tokens": 2}, headers)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/v1/projects/default/spans") as answer:
                found = {span["name"]: span for span in json.load(answer)["data"]}
                return found if "text_completion tiny" in found else {}  # it ends, and comes, last
            return {}

        spans = server.wait_until(seen)
        assert set(spans) == {"text_completion tiny", "queue", "prefill", "decode"}
        root = spans.pop("text_completion tiny")
        assert (root["context"]["trace_id"], root["parent_id"]) == (TRACE, PARENT)
        assert root["attributes"]["gen_ai.usage.output_tokens"] == 2
        assert {span["parent_id"] for span in spans.values()} == {root["context"]["span_id"]}
    finally:
        collector.terminate()
        collector.wait(60)
