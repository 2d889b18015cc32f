"""A record is one line, whatever clients call their fields."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.server.telemetry.log import OneLineFormatter, printable, say

BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
pieces = st.text(st.characters(), max_size=8) | st.sampled_from([*BREAKS, "\x1b[2J", "\u202e", "\ud800", "\x00"])
hostile = st.lists(pieces, max_size=6).map("".join)
FORGED = "12:00:00 INFO all is well"


def logged(message: str, *arguments: object, error: BaseException | None = None) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    record = logging.LogRecord("x", logging.WARNING, "here.py", 1, message, arguments, None)
    record.exc_info = None if error is None else (type(error), error, error.__traceback__)
    handler.emit(record)
    return stream.getvalue()


@given(hostile)
def test_a_message_is_one_line_of_visible_characters(text: str) -> None:
    for line in (logged("ignored unknown request field %s", text + FORGED), logged(text + FORGED)):
        assert line.endswith("\n") and len(line.splitlines()) == 1
        assert line[:-1].isprintable()
        line.encode()
    assert printable(text) == text or not text.isprintable()


@given(hostile, st.sampled_from(BREAKS))
def test_an_error_text_cannot_pass_for_a_record(text: str, line_break: str) -> None:
    try:
        raise ValueError(f"{text}{line_break}{FORGED}")
    except ValueError as error:
        lines = logged("request %s failed", text, error=error).splitlines()
    assert lines[1].strip() == "Traceback (most recent call last):"
    assert [line for line in lines if re.match(r"\S", line)] == lines[:1]
    assert all(line.isprintable() for line in lines)


def test_what_may_be_seen_stays_and_what_is_endless_is_cut() -> None:
    assert printable("Grüße, 日本 😀 'a' \\n") == "Grüße, 日本 😀 'a' \\n"
    assert printable("a\nb\x1b\u2028\ud800") == "a\\nb\\x1b\\u2028\\ud800"
    assert len(logged("%s", "x" * 10**6)) < 5000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no file on a full disk")
def test_what_standard_output_does_not_take_goes_to_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    say("it serves")
    assert capsys.readouterr().out == "it serves\n" and not caplog.messages
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        say("it serves")
        full.flush()  # as Python does at its end
    [told] = caplog.messages
    assert "No space left on device" in told and "it serves" in told
