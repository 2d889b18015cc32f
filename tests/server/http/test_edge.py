"""What is alike for every answer: its id, and how HTTP's own methods and codings are answered."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
from typing import Any

import pytest

COMPLETE = "/v1/completions"
JSON = {"content-type": "application/json"}
GET_ROUTES = ["/health", "/ready", "/metrics", "/version", "/v1/models", "/dashboard", "/admin/v1/status"]
POST_ROUTES = [COMPLETE, "/v1/chat/completions", "/tokenize", "/detokenize", "/admin/v1/evolve"]
BODY = b'{"prompt": "x", "max_tokens": 1}'

ANSWERS: list[tuple[str, str, bytes | None, dict[str, str], int]] = [
    *(("GET", path, None, {}, 200) for path in GET_ROUTES),
    *(("HEAD", path, None, {}, 200) for path in GET_ROUTES),
    ("POST", COMPLETE, BODY, JSON, 200),
    ("POST", COMPLETE, b'{"prompt": "x", "max_tokens": 1, "stream": true}', JSON, 200),
    ("POST", COMPLETE, b'{"prompt": 5}', JSON, 400),
    ("POST", "/tokenize", b"{", JSON, 400),
    ("POST", "/tokenize", b"", JSON, 400),
    ("POST", "/tokenize", b'{"prompt": "x", "model": "y"}', JSON, 404),
    ("GET", "/nothing", None, {}, 404),
    ("POST", "/tokenize/", b'{"prompt": "x"}', JSON, 404),
    ("POST", "//tokenize", b'{"prompt": "x"}', JSON, 404),
    ("GET", COMPLETE, None, {}, 405),
    ("DELETE", "/health", None, {}, 405),
    ("OPTIONS", COMPLETE, None, {}, 204),
    ("POST", "/admin/v1/evolve", b'{"action": "train"}', JSON, 409),
    ("POST", COMPLETE, b"x", {"content-type": "text/plain"}, 415),
    ("POST", COMPLETE, BODY, {"content-type": "application/octet-stream"}, 415),
    ("POST", "/reset_prefix_cache", b"", {"content-type": "application/octet-stream"}, 200),  # as aiohttp says nothing
    ("POST", COMPLETE, gzip.compress(BODY, mtime=0), JSON | {"content-encoding": "gzip"}, 415),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), ANSWERS)
def test_every_answer_has_a_request_id(
    server: Any, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    found = [server.request(method, path, body, headers) for _ in range(2)]
    assert [answer[0] for answer in found] == [status, status]
    fresh = [answer[1]["x-request-id"] for answer in found]
    assert len(set(fresh)) == 2
    sent = server.request(method, path, body, headers | {"x-request-id": "trace-{7}%s"})
    assert sent[1]["x-request-id"] == "trace-{7}%s"
    unfit = server.request(method, path, body, headers | {"x-request-id": "two words"})
    assert unfit[1]["x-request-id"] not in ("two words", *fresh)


def test_a_body_may_name_the_request(server: Any) -> None:
    for more in ({}, {"stream": True}):
        body = json.dumps({"prompt": "x", "max_tokens": 1, "request_id": "mine", **more}).encode()
        answer = server.request("POST", COMPLETE, body, JSON | {"x-request-id": "other"})
        assert (answer[0], answer[1]["x-request-id"]) == (200, "mine")
        assert b'"id":"cmpl-mine"' in answer[2]


@pytest.mark.parametrize("path", GET_ROUTES)
def test_head_is_get_without_the_body(server: Any, path: str) -> None:
    answers = [server.request(method, path) for method in ("GET", "HEAD")]
    whole, head = ({name: value for name, value in answer[1].items() if name != "x-request-id"} for answer in answers)
    assert head.keys() == whole.keys()
    assert head["content-type"] == whole["content-type"]
    assert answers[0][2] and answers[1][2] == b""


@pytest.mark.parametrize("path", [*GET_ROUTES, *POST_ROUTES])
def test_allow_names_the_methods_of_a_route(server: Any, path: str) -> None:
    methods = {"POST", "OPTIONS"} if path in POST_ROUTES else {"GET", "HEAD", "OPTIONS"}
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - methods:
        status, headers, _ = server.request(method, path)
        assert status == 405
        assert set(headers["allow"].split(", ")) == methods
    status, headers, body = server.request("OPTIONS", path)
    assert (status, body) == (204, b"")
    assert set(headers["allow"].split(", ")) == methods


def test_allow_names_the_methods_of_all_routes_with_a_path(server: Any) -> None:
    paths = server.get("/openapi.json")[1]["paths"]
    assert any(len(methods) > 1 for methods in paths.values())
    for path, methods in paths.items():
        asked = re.sub(r"{\w+}", "1", path)
        also = [paths[other] for other in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", other), asked)]
        least, most = (
            {method.upper() for each in found for method in each}
            | ({"HEAD"} if any("get" in each for each in found) else set())
            for found in ([methods], also)  # others' paths may match, too, if what they take is of that kind
        )
        status, headers, _ = server.request("OPTIONS", asked)
        assert status == 204
        assert least | {"OPTIONS"} <= set(headers["allow"].split(", ")) <= most | {"OPTIONS"}, path


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "gzip, identity", "nonsense"])
def test_compressed_bodies_are_refused_with_a_reason(server: Any, coding: str) -> None:
    for path in POST_ROUTES[:-1]:
        answer = server.request("POST", path, gzip.compress(BODY), JSON | {"content-encoding": coding})
        assert answer[0] == 415
        assert "compressed" in json.loads(answer[2])["error"]["message"]
    assert server.request("POST", COMPLETE, BODY, JSON | {"content-encoding": "identity"})[0] == 200


def test_text_that_is_not_utf8(server: Any) -> None:
    text = '{"prompt": "Hé"}'
    for body in (text.encode("utf-16"), text.encode("utf-16-le"), text.encode("utf-32"), text.encode("latin-1")):
        status, _, reply = server.request("POST", "/tokenize", body, JSON)
        assert status == 400
        assert json.loads(reply)["error"]["message"].endswith("it must be UTF-8")
    assert (
        server.request("POST", "/tokenize", text.encode("utf-8-sig"), JSON)[2]
        == (server.request("POST", "/tokenize", text.encode(), JSON)[2])
    )


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (b"Expect: 100-continue\r\nContent-Length: 15", b'{"prompt":"Hi"}', 200),
        (b"Transfer-Encoding: chunked", b'f\r\n{"prompt":"Hi"}\r\n0\r\n\r\n', 200),
        (b"Transfer-Encoding: gzip, chunked", b'f\r\n{"prompt":"Hi"}\r\n0\r\n\r\n', 415),
        (b"Transfer-Encoding: chunked", b"zz\r\n", 400),
        (b"Transfer-Encoding: gzip", b'{"prompt":"Hi"}', 400),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 15", b'f\r\n{"prompt":"Hi"}\r\n0\r\n\r\n', 400),
        (b"Content-Length: 15\r\nContent-Length: 16", b'{"prompt":"Hi"}', 400),
        (b"Content-Length: -5", b'{"prompt":"Hi"}', 400),
        (b"Content-Length: 15\r\nContent-Type: multipart/form-data; boundary=x", b'{"prompt":"Hi"}', 415),
    ],
)
def test_how_a_body_may_come(server: Any, head: bytes, body: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
        start = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        connection.sendall(start + head + b"\r\n\r\n" + body)
        received = b""
        with contextlib.suppress(ConnectionError):  # closed before all of the body was read
            while chunk := connection.recv(65536):
                received += chunk
    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    told, _, reply = received.partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nx-request-id: " in told
    assert json.loads(reply).keys() == (
        {"error"} if status != 200 else {"count", "max_model_len", "tokens", "token_strs"}
    )


def test_white_space_after_a_length_is_none_of_it(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Length: {len(BODY)} \t\r\n\r\n"
        connection.sendall(head.encode() + BODY)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "path", ["/", "/health", COMPLETE, "/v1/messages", "/v1/models/tiny-model", "/admin/v1/status"]
)
def test_a_line_break_at_the_end_of_a_path_names_no_route(server: Any, path: str) -> None:
    for method in ("GET", "POST"):
        status, _, reply = server.request(method, path + "%0A")
        assert (status, json.loads(reply)["error"]["code"]) == (404, "unknown_route")
