"""Two holders of keys on one server: what one does, the other cannot tell. A test per side channel."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from slipstream.engine.grammars import grammar
from slipstream.engine.grammars.compiling import compile_grammar
from slipstream.server.access.keys import digest
from tests.server.under_way import slow_steps

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
ACME, GLOBEX, ROOT = "acme-key", "globex-key", "root-key"
TEXT = "The quick brown fox jumps over the lazy dog. " * 6
LIMITS = {
    ACME: ("acme", "most_urgent_priority = -5\nrequests_per_minute = 1000\ntokens_per_minute = 5000000"),
    GLOBEX: ("globex", "requests_per_minute = 1000\ntokens_per_minute = 5000000\nmost_urgent_priority = 3"),
    "limited-key": ("limited", "requests_per_minute = 2"),
    "spent-key": ("spent", "tokens_per_minute = 30"),
    "narrow-key": ("narrow", "max_concurrent = 1\nmax_n = 4"),
    ROOT: ("root", 'role = "admin"'),
}


@pytest.fixture(scope="module")
def shared(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tenants")
    file = folder / "keys.toml"
    entries = (
        f'[[key]]\nname = "{name}"\nhash = "sha256:{digest(key.encode()).hex()}"\n{limits}\n'
        for key, (name, limits) in LIMITS.items()
    )
    file.write_text("\n".join(entries))
    return start_local(
        keys_file=str(file),
        **{"speculation": "suffix", "speculation_policy": "fixed"},  # however long steps take here
        **{"traffic_log": "tokens", "traffic_folder": str(folder / "traffic")},
        **{"max_running": 2, "max_queued_requests": 2, "max_model_len": 8192},
    )


@contextlib.contextmanager
def holding(server: Any, key: str) -> Iterator[Any]:
    server.headers = {"authorization": f"Bearer {key}"}
    try:
        yield server
    finally:
        server.headers = {}


def ask(server: Any, key: str, path: str = COMPLETE, **body: Any) -> tuple[int, dict[str, str], Any]:
    fields = {"prompt": "x", "max_tokens": 1} | body if path == COMPLETE else body
    with holding(server, key):
        status, headers, reply = server.request(
            "POST", path, json.dumps(fields).encode(), {"content-type": "application/json"}
        )
    return status, headers, json.loads(reply)


def cached(server: Any, key: str, **fields: Any) -> int:
    _, _, reply = ask(server, key, prompt=TEXT, **fields)
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_cached_prompts_are_found_by_their_tenant_alone(shared: Any) -> None:
    assert cached(shared, ACME) == 0
    assert cached(shared, ACME) > 0
    assert cached(shared, GLOBEX) == 0
    assert cached(shared, GLOBEX, user="acme") == 0, "nobody can name the tenant of another key"
    assert cached(shared, GLOBEX) > 0


def proposed(server: Any, key: str) -> int:
    wanted = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_metrics": True}
    _, _, reply = ask(server, key, prompt="A text of which there is an answer", **wanted)
    return int(reply["metrics"]["speculative_decoding"]["num_draft_tokens"])


def test_earlier_answers_are_proposed_to_their_tenant_alone(shared: Any) -> None:
    first = proposed(shared, ACME)
    assert proposed(shared, ACME) > first
    assert proposed(shared, GLOBEX) == first


def test_a_compiled_schema_is_found_by_its_tenant_alone(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time to the first token would tell whether another one has sent the same schema of late."""
    compiled: list[str] = []

    def counting(tokenizer: Any, text: str) -> Any:
        compiled.append(text)
        return compile_grammar(tokenizer, text)

    monkeypatch.setattr(grammar, "compile_grammar", counting)
    body = {"structured_outputs": {"choice": ["a secret", "another secret"]}, "max_tokens": 9}
    counts = []
    for key in (ACME, ACME, GLOBEX, GLOBEX):
        assert ask(shared, key, **body)[0] == 200
        counts.append(len(compiled))
    assert counts == [1, 1, 2, 2]


def test_traffic_is_kept_by_tenant_and_shown_to_none_of_them(shared: Any) -> None:
    for key in (ACME, GLOBEX):
        assert ask(shared, key, user="bob", max_tokens=3)[0] == 200

    def tenants() -> Any:
        with holding(shared, ROOT):
            return shared.get("/admin/v1/traffic")[1]

    shared.wait_until(lambda: {"acme/bob", "globex/bob"} <= set(json.dumps(tenants()).split('"')))
    for key in (ACME, GLOBEX):
        with holding(shared, key):
            assert shared.get("/admin/v1/traffic")[0] == 403
            assert shared.post("/admin/v1/traffic/purge", {"tenant": "acme/bob"})[0] == 403


def test_priorities_are_those_of_the_key(shared: Any) -> None:
    assert ask(shared, ACME, priority=-5)[0] == ask(shared, ACME)[0] == 200
    assert ask(shared, ACME, priority=-6)[2]["error"]["param"] == "priority"
    assert ask(shared, GLOBEX)[0] == ask(shared, GLOBEX, priority=3)[0] == 200, "without one it has that of its key"
    for priority in (-1, 1, 2):
        assert ask(shared, GLOBEX, priority=priority)[2]["error"]["param"] == "priority"


def left(headers: dict[str, str]) -> tuple[int, int]:
    return int(headers["x-ratelimit-remaining-requests"]), int(headers["x-ratelimit-remaining-tokens"])


def test_what_one_takes_is_not_missing_to_the_other(shared: Any) -> None:
    _, before, _ = ask(shared, GLOBEX)
    for _ in range(20):
        assert ask(shared, ACME, prompt=TEXT)[0] == 200
    _, after, _ = ask(shared, GLOBEX)
    assert left(after)[0] >= left(before)[0] - 1 and left(after)[1] >= left(before)[1] - 10
    assert after["x-ratelimit-limit-requests"] == "1000" and after["x-ratelimit-limit-tokens"] == "5000000"


BODIES: dict[str, dict[str, Any]] = {
    COMPLETE: {},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 1}},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 1}},
    "/tokenize": {"prompt": "x"},
}


def stop_the_clock(server: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key has taken does not come back."""
    account = server.service.keys.named(name).account
    for allowance in (account._requests, account._tokens):
        monkeypatch.setattr(allowance, "_clock", partial(float, allowance._at))


def test_too_many_requests_per_minute_are_refused_in_every_dialect(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(shared, "limited", monkeypatch)
    statuses = [ask(shared, "limited-key", path, **body)[0] for path, body in list(BODIES.items())[:2]]
    assert statuses == [200, 200]
    for path, body in BODIES.items():
        status, headers, reply = ask(shared, "limited-key", path, **body)
        assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded"), path
        assert 1 <= int(headers["retry-after"]) <= 30
        assert headers["x-ratelimit-remaining-requests"] == "0" and headers["x-request-id"]
    with holding(shared, "limited-key"):
        assert shared.get("/v1/models")[0] == 200, "questions about the server are free"


def test_too_many_tokens_per_minute(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(shared, "spent", monkeypatch)
    assert ask(shared, "spent-key", max_tokens=40, ignore_eos=True)[0] == 200
    status, headers, reply = ask(shared, "spent-key")
    assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after"]) >= 10 and headers["x-ratelimit-remaining-tokens"] == "0"


def test_what_a_key_may_have_at_a_time(shared: Any) -> None:
    assert ask(shared, "narrow-key", n=2)[2]["error"]["param"] == "n"
    with slow_steps(), holding(shared, "narrow-key"), shared.open_stream():
        status, headers, reply = ask(shared, "narrow-key")
        assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(headers["retry-after"]) >= 1
        assert ask(shared, ACME)[0] == 200
    shared.wait_until_idle()


def test_nobody_fills_the_queue_for_others(shared: Any) -> None:
    shared.wait_until_idle()
    long = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True}
    with slow_steps(), contextlib.ExitStack() as stack:
        with holding(shared, ACME):
            for _ in range(4):
                stack.enter_context(shared.send(COMPLETE, long))
        shared.wait_until(lambda: shared.metric("num_requests_waiting") == 2)
        status, headers, reply = ask(shared, ACME)
        assert (status, reply["error"]["code"]) == (429, "queue_full") and int(headers["retry-after"]) >= 1
        with holding(shared, GLOBEX):
            stack.enter_context(shared.send(COMPLETE, long))
        shared.wait_until(lambda: shared.metric("num_requests_waiting") == 3)
    shared.wait_until_idle()


def test_groups_of_rollouts_are_those_of_the_tenant(shared: Any) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8000, "ignore_eos": True, "request_id": "mine"}
    with slow_steps(), holding(shared, ACME), shared.send(COMPLETE, body | {"rollout": {"group": "g"}, "n": 2}):
        shared.wait_until(lambda: shared.metric("num_requests_running") == 2)
        prune = {"group": "g", "scores": {"mine-0": 1.0, "mine-1": 0.0}, "keep": 1}
        assert ask(shared, GLOBEX, "/v1/rollouts/prune", **prune)[2] == {"pruned": []}
        assert ask(shared, ACME, "/v1/rollouts/prune", **prune)[2] == {"pruned": ["mine-1"]}
    shared.wait_until_idle()


BY_NAME: dict[str, dict[str, Any]] = {
    "/abort_request": {"rid": "same"},
    "/abort_requests": {"request_ids": ["same"]},
    "/inference/v1/abort_requests": {"request_ids": ["same"]},
    "/admin/v1/abort": {"ids": ["same"]},
}


def test_requests_of_one_name_end_each_by_itself(shared: Any) -> None:
    shared.wait_until_idle()
    named = {"request_id": "same", "n": 1}
    with contextlib.ExitStack() as slowly:
        slowly.enter_context(slow_steps())
        with holding(shared, GLOBEX), shared.open_stream(max_tokens=600, **named) as theirs:
            with holding(shared, ACME), shared.open_stream(**named):
                shared.wait_until(lambda: shared.metric("num_requests_running") == 2)
                for path, body in BY_NAME.items():
                    assert ask(shared, ACME, path, **body)[0] == 403, "names of others are nobody's business"
            shared.wait_until(lambda: shared.metric("num_requests_running") <= 1)  # that client has gone away
            slowly.close()
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                chunk = theirs.recv(65536)
                assert chunk, received[-300:]
                received += chunk
    assert b'"finish_reason":"length"' in received and received.count(b"[DONE]") == 1
