"""A request has one answer, whoever is cancelled while a line of it is written: threads go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slipstream.server.batch import lines
from slipstream.server.batch.lines import AnswerLine, ErrorOfLine, Progress, ResponseOfLine

PATIENCE_S = 300.0
ANSWER = AnswerLine("batch_req_1", "a", ResponseOfLine(200, "batch_req_1", msgspec.Raw(b"{}")))
REQUEST = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n'


class SlowDisk:
    """The first line that is written takes until ``goes_on`` is set."""

    def __init__(self, write: Callable[[int, bytes], int]) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self._write = write

    def write(self, file: int, data: bytes) -> int:
        if data.startswith(b'{"id":"batch_req_1"'):
            self.begun.set()
            assert self.goes_on.wait(PATIENCE_S)
        return self._write(file, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(lines.os.write)
    monkeypatch.setattr(lines.os, "write", disk.write)
    yield disk
    disk.goes_on.set()


def started(target: Callable[..., Any], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments)
    thread.start()
    return thread


def test_who_closes_waits_for_the_line_that_is_being_written(tmp_path: Path, disk: SlowDisk) -> None:
    progress = Progress(tmp_path / "output", tmp_path / "errors")
    writer = started(progress.write, ANSWER)
    assert disk.begun.wait(PATIENCE_S)
    closer = started(progress.close)
    closer.join(0.1)
    assert closer.is_alive()
    disk.goes_on.set()
    for thread in (closer, writer):
        thread.join(PATIENCE_S)
    again = Progress(tmp_path / "output", tmp_path / "errors")
    assert again.done == {"a"}
    again.close()


def test_what_is_left_is_not_what_is_being_written(tmp_path: Path, disk: SlowDisk) -> None:
    (tmp_path / "input").write_bytes(REQUEST + REQUEST.replace(b'"a"', b'"b"'))
    progress = Progress(tmp_path / "output", tmp_path / "errors")
    writer = started(progress.write, ANSWER)
    assert disk.begun.wait(PATIENCE_S)
    leaver = started(progress.leave, tmp_path / "input", "batch_expired", "Too late.")
    leaver.join(0.1)
    disk.goes_on.set()
    for thread in (leaver, writer):
        thread.join(PATIENCE_S)
    progress.write(AnswerLine("batch_req_2", "a", None, ErrorOfLine("batch_expired", "Too late.")))
    progress.close()
    assert (progress.counts.completed, progress.counts.failed) == (1, 1)
    [left] = (tmp_path / "errors").read_text().splitlines()
    assert json.loads(left)["custom_id"] == "b"


def test_what_is_told_meanwhile_is_of_whole_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on, decode = threading.Event(), threading.Event(), lines.decode_usage

    def slow(body: msgspec.Raw) -> Any:
        begun.set()
        assert goes_on.wait(PATIENCE_S)
        return decode(body)

    monkeypatch.setattr(lines, "decode_usage", slow)
    progress, told = Progress(tmp_path / "output", tmp_path / "errors"), list[Any]()
    body = msgspec.Raw(b'{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}')
    writer = started(progress.write, AnswerLine("batch_req_2", "a", ResponseOfLine(200, "batch_req_2", body)))
    assert begun.wait(PATIENCE_S)
    teller = started(lambda: told.append(progress.counted()))
    teller.join(0.1)
    assert not told
    goes_on.set()
    for thread in (writer, teller):
        thread.join(PATIENCE_S)
    [(counts, usage)] = told
    assert (counts.completed, usage.input_tokens, usage.output_tokens) == (1, 3, 5)
    progress.close()
