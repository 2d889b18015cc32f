"""Files and lines of batches that parsers stumble over: they are refused, and hold up none of the others."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from slipstream.server.batch import runner
from slipstream.server.batch.lines import Progress, check, decode_request, problem_of, refusal
from tests.server.under_way import slow_steps

URL = "/v1/completions"
GOOD = json.dumps({"prompt": "x", "max_tokens": 1}).encode()


def line(custom_id: str, body: bytes) -> bytes:
    return b'{"custom_id": "%b", "method": "POST", "url": "/v1/completions", "body": %b}\n' % (custom_id.encode(), body)


def nested(levels: int) -> bytes:
    return b'{"prompt": "x", "stop": %b}' % (b"[" * levels + b"]" * levels)


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_local(batch_folder=str(tmp_path_factory.mktemp("batches")))


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def ended(server: Any, client: openai.OpenAI, content: bytes) -> Any:
    file = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    server.wait_until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    return client.batches.retrieve(batch.id)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "model": 1e999}',
        b'{"prompt": "x", "model": %b}' % (b"9" * 5000),
        b'{"prompt": "x", "model": "\xff"}',
        b'{"prompt": "x", "stream": 1e999}',
        b'{"prompt": "x\xff"}',
        nested(300),
    ],
)
def test_a_line_that_cannot_be_read_fails_alone(server: Any, client: openai.OpenAI, body: bytes) -> None:
    batch = ended(server, client, line("odd", body) + line("good", GOOD))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    [failed] = [json.loads(each) for each in client.files.content(batch.error_file_id).text.splitlines()]
    assert failed["custom_id"] == "odd" and failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["type"] == "invalid_request_error"


def test_a_line_that_is_nested_without_end_fails_its_batch(server: Any, client: openai.OpenAI) -> None:
    batch = ended(server, client, line("good", GOOD) + line("odd", nested(50_000)))
    assert batch.status == "failed"
    assert [(each.code, each.line) for each in batch.errors.data] == [("invalid_json_line", 2)]


def test_a_batch_without_errors_leaves_no_empty_file(server: Any, client: openai.OpenAI) -> None:
    batch = ended(server, client, line("good", GOOD))
    files = Path(server.service.config.batch_folder) / "files"
    assert batch.error_file_id is None and (files / batch.output_file_id).stat().st_size
    server.wait_until(lambda: all(path.stat().st_size for path in files.iterdir()))


def test_a_batch_that_is_cancelled_before_its_file_is_read_ends(
    server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of it is answered, whether it can be read or not."""
    begun, goes_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert goes_on.wait(300)
        return check(*arguments)

    monkeypatch.setattr(runner, "check", slow)
    file = client.files.create(file=("in.jsonl", io.BytesIO(line("good", GOOD) + b"{")), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    assert begun.wait(300)
    assert client.batches.cancel(batch.id).status == "cancelling"
    goes_on.set()
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled")
    batch = client.batches.retrieve(batch.id)
    assert (batch.request_counts.total, batch.request_counts.failed) == (0, 0)
    assert batch.errors is batch.output_file_id is batch.error_file_id is None
    assert client.files.delete(file.id).deleted


def test_the_end_of_a_cancelled_batch_is_not_cancelled_itself(
    server: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it takes longer than it takes to look at all batches once more."""
    sync, ends = Progress.sync, list[Progress]()

    def slow(progress: Progress) -> tuple[int, int]:
        ends.append(progress)
        time.sleep(3 * runner.POLL_S)
        return sync(progress)

    monkeypatch.setattr(Progress, "sync", slow)
    body = json.dumps({"prompt": "x", "max_tokens": 7000, "ignore_eos": True}).encode()
    file = client.files.create(file=("in.jsonl", io.BytesIO(line("long", body))), purpose="batch")
    with slow_steps():
        batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
        client.batches.cancel(batch.id)
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled")
    assert len(ends) == 1


def called_deep(levels: int, what: Callable[[], Any]) -> Any:
    return called_deep(levels - 1, what) if levels else what()


def test_what_passes_the_check_can_be_read_where_calls_are_deeper() -> None:
    lines = [line("a", nested(levels)) for levels in range(1, 1100)]
    right = [each for each in lines if problem_of(each, URL, 10**6, set()) is None]
    assert 200 < len(right) < len(lines), "the limit lies elsewhere"
    for each in right:
        assert called_deep(100, partial(decode_request, each)).custom_id == "a"
        assert called_deep(100, partial(refusal, decode_request(each).body)) is None


@pytest.mark.parametrize("charset", ["utf-7", "idna", "unicode_escape", "latin-1", "undefined", "nonsense"])
def test_a_form_is_in_utf_8(server: Any, charset: str) -> None:
    """What other codecs give may be no text: surrogates, which nothing can write."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="+2AA-\\ud800"\r\n\r\n{}\r\n--b--\r\n'
    )
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    status, _, reply = server.request("POST", "/v1/files", form, {"content-type": kind})
    assert (status, json.loads(reply)["error"]["code"]) == (415, "unsupported_media_type")
    status, _, reply = server.request("POST", "/v1/files", form, {"content-type": kind.replace(charset, "UTF-8")})
    assert status == 200, reply
