import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from slipstream.clients import retries, sync
from slipstream.clients.errors import APIError, BrokenStreamError, ClientError, UnreachableError
from slipstream.clients.sync import Client

BODY = {"messages": [{"role": "user", "content": "hi"}]}
TOKEN = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Scripted(ThreadingHTTPServer):
    """Answers (status, headers, body) in this order; a status of 0 closes the connection."""

    def __init__(self):
        self.answers = []
        self.bodies = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                status, headers, body = self.server.answers.pop(0)
                if not status:
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.001)
    server = Scripted()
    yield server
    server.shutdown()
    server.server_close()


def events(*blocks, **headers):
    return 200, {"Content-Type": "text/event-stream; charset=utf-8", **headers}, b"".join(blocks)


def answer(status, body, **headers):
    return status, {"Content-Type": "application/json", **headers}, msgspec.json.encode(body)


def test_an_answer_and_its_chunks(scripted):
    scripted.answers = [answer(200, {"choices": []}), events(TOKEN, TOKEN, DONE), answer(200, {"data": [{"id": "m"}]})]
    with Client(scripted.url + "/v1") as client:
        assert client.chat(BODY) == {"choices": []}
        chunks = list(client.chat_stream(BODY))
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a", "a"]
        assert client.models() == ["m"]
    assert msgspec.json.decode(scripted.bodies[1]) == BODY | {"stream": True}


def test_what_was_not_begun_is_tried_again(scripted):
    busy = answer(503, {"error": {"message": "full", "type": "overloaded"}}, **{"Retry-After": "0.01"})
    limited = answer(429, {"error": {"message": "slowly"}})
    scripted.answers = [busy, limited, answer(200, {"ok": 1})]
    with Client(scripted.url) as client:
        assert client.chat(BODY) == {"ok": 1}
    scripted.answers = [busy, busy]
    with Client(scripted.url, retries=1) as client, pytest.raises(APIError, match="full") as raised:
        client.chat(BODY)
    assert (raised.value.status, raised.value.retry_after) == (503, 0.01)
    assert not scripted.answers


def test_what_may_have_been_begun_is_not_tried_again(scripted):
    scripted.answers = [(0, {}, b""), answer(200, {}), answer(500, {"error": {"message": "oops"}}), answer(200, {})]
    with Client(scripted.url) as client:
        with pytest.raises(UnreachableError):
            client.chat(BODY)
        assert client.chat(BODY) == {}
        with pytest.raises(APIError, match="oops"):
            client.chat(BODY)
    assert len(scripted.answers) == 1


def test_nobody_is_there(monkeypatch, scripted):
    waits, sleep, here = [], time.sleep, threading.get_ident()

    def no_sleep(seconds):
        if threading.get_ident() != here:  # servers of other tests, in threads of this process
            return sleep(seconds)
        waits.append(seconds)

    monkeypatch.setattr(sync.time, "sleep", no_sleep)
    url = scripted.url
    scripted.shutdown()
    scripted.server_close()
    with Client(url, retries=3) as client, pytest.raises(UnreachableError, match=r"127\.0\.0\.1"):
        client.models()
    assert waits == [0.001, 0.002, 0.004]


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (events(TOKEN), BrokenStreamError, "without"),
        (events(b"data: {\n\n"), BrokenStreamError, "not JSON"),
        (events(b'data: {"error": {"message": "gone"}}\n\n'), APIError, "gone"),
        (answer(200, {}), BrokenStreamError, "not an event stream"),
        (events(TOKEN, **{"Content-Length": "1000"}), BrokenStreamError, "connection lost"),
    ],
)
def test_a_stream_that_is_none(scripted, reply, kind, said):
    scripted.answers = [reply]
    with Client(scripted.url) as client, pytest.raises(kind, match=said):
        list(client.chat_stream(BODY))


def test_an_answer_that_is_no_object(scripted):
    scripted.answers = [answer(200, [1])]
    with Client(scripted.url) as client, pytest.raises(ClientError, match="JSON object"):
        client.chat(BODY)
