"""Who is trusted for what, asked of servers: docs/api.md promises it."""

from __future__ import annotations

import json
from typing import Any

import pytest

JSON = {"content-type": "application/json"}
PROMPT = {"prompt": "The sea is " * 12, "max_tokens": 1}


def ask(server: Any, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, reply = server.request("POST", "/v1/completions", json.dumps(body).encode(), JSON | sent)
    return status, json.loads(reply)


def cached(server: Any, **fields: Any) -> int:
    count: int = server.complete(**PROMPT | fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_no_request_is_more_urgent_than_the_server_lets_it(server: Any) -> None:
    for priority in (-1, -1000):
        status, reply = ask(server, PROMPT | {"priority": priority})
        assert (status, reply["error"]["param"]) == (400, "priority")
        assert "0 to 1000" in reply["error"]["message"] and "--most-urgent-priority" in reply["error"]["message"]
    assert ask(server, PROMPT | {"priority": 1000})[0] == 200


def test_pages_of_others_get_nothing(server: Any) -> None:
    for path in ("/v1/models", "/health", "/admin/v1/status"):
        assert server.request("GET", path, headers={"host": "rebound.example"})[0] == 403
        assert server.request("GET", path, headers={"origin": "http://evil.example"})[0] == 403
    assert ask(server, PROMPT, origin="http://evil.example")[0] == 403
    assert ask(server, PROMPT, origin=f"http://rebound.example:{server.port}")[0] == 403
    assert ask(server, PROMPT, origin=server.url)[0] == 200
    body = json.dumps(PROMPT).encode()
    assert server.request("POST", "/v1/completions", body, {"origin": server.url})[0] == 415
    assert server.request("POST", "/v1/completions", body)[0] == 200, "a program need not declare its body"
    assert server.request("OPTIONS", "/v1/completions", headers={"origin": "http://evil.example"})[0] == 403


def test_tenants_do_not_see_what_others_have_asked(server: Any) -> None:
    assert cached(server, user="alice") == 0
    assert cached(server, user="alice") > 16
    assert cached(server, user="bob") == cached(server, metadata={"slipstream_tenant": "eve"}) == 0
    assert cached(server, metadata={"slipstream_tenant": "bob"}) > 16, "the same as user"


def test_holders_of_keys_do_not_either_whatever_they_call_themselves(small_server: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert cached(small_server, user="alice") == 0
        assert cached(small_server, user="alice") > 16
        patch.setitem(small_server.headers, "authorization", "Bearer second-key")
        assert cached(small_server, user="alice") == 0
        for user in ("first-key/alice", "/alice", "alice/"):
            assert cached(small_server, user=user) == 0


def test_a_name_with_a_line_break_is_no_line_of_the_log(small_server: Any) -> None:
    name = "colour\r\n12:00:00 WARNING forged\x1b[2J\u2028"
    assert ask(small_server, PROMPT | {name: 1}, **small_server.headers)[0] == 200
    small_server.wait_until_logged("ignored unknown request field colour")
    assert not [line for line in small_server.log if line.startswith("12:00:00 WARNING forged")]
    [line] = [line for line in small_server.log if "forged" in line]
    assert r"colour\r\n12:00:00 WARNING forged\x1b[2J\u2028" in line
