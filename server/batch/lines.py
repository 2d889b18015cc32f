"""Lines of a batch: requests as they come in, answers as they go out, and what of them is done."""

from __future__ import annotations

import errno
import logging
import os
import threading
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from slipstream.server.batch.records import LineProblem, RequestCounts, UsageOfBatch, fresh

logger = logging.getLogger(__name__)

MOST_LINES = 50_000
MOST_FILE_LINES = 2 * MOST_LINES
"""With those that are empty: they take time, too."""
MOST_PROBLEMS = 100
MOST_ID_CHARS = 512
PIECE_LINES, PIECE_BYTES = 64, 2**20
"""About as much is read at a time."""
SPACE_BYTES = 64
"""What a line may have around its request."""


class RequestLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Mode(msgspec.Struct):
    """What a body may ask for that a batch cannot do."""

    stream: Any = None
    background: Any = None
    model: Any = None


class ErrorOfLine(msgspec.Struct):
    code: str
    message: str


class ResponseOfLine(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class AnswerLine(msgspec.Struct):
    id: str
    custom_id: str
    response: ResponseOfLine | None
    error: ErrorOfLine | None = None


class Cached(msgspec.Struct):
    cached_tokens: int | None = 0


class Reasoning(msgspec.Struct):
    reasoning_tokens: int | None = 0


class Usage(msgspec.Struct):
    """As chat and completions have it, or responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Cached | None = None
    completion_tokens_details: Reasoning | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: Cached | None = None
    output_tokens_details: Reasoning | None = None


class HasUsage(msgspec.Struct):
    usage: Usage | None = None
    model: str | None = None


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not what they should be; also for what is nested too deeply."""
SPARE_LEVELS = 500
"""How deeply a line may be nested depends on how deep calls are where it is decoded. So it is tried once with as many
levels more; routes take 200 at most."""
encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(RequestLine).decode
skim = msgspec.json.Decoder(msgspec.Raw).decode
decode_answer = msgspec.json.Decoder(AnswerLine).decode
decode_usage = msgspec.json.Decoder(HasUsage).decode
decode_mode = msgspec.json.Decoder(Mode).decode


class TooManyLinesError(Exception):
    """A file goes on behind the last line that it may have."""

    def __init__(self, number: int) -> None:
        super().__init__(f"line {number}")
        self.number = number


def pieces(path: Path, most_bytes: int | None = None) -> Iterator[list[tuple[int, bytes]]]:
    """The lines that are not empty, some at a time, with their numbers from 1.

    A line without end has a beginning only, which is longer than ``most_bytes``. Raises TooManyLinesError.
    """
    piece: list[tuple[int, bytes]] = []
    number = size = 0
    longest = -1 if most_bytes is None else most_bytes + SPACE_BYTES
    with path.open("rb") as file:
        while line := file.readline(longest):
            number += 1
            if number > MOST_FILE_LINES:
                raise TooManyLinesError(number)
            if len(line) == longest and not line.endswith(b"\n"):
                while (rest := file.readline(PIECE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            elif not (line := line.removeprefix(BOM_UTF8).strip()):
                continue
            piece.append((number, line))
            size += len(line)
            if len(piece) >= PIECE_LINES or size >= PIECE_BYTES:
                yield piece
                piece, size = [], 0
    if piece:
        yield piece


def check(path: Path, endpoint: str, most_bytes: int) -> tuple[int, list[LineProblem], str | None]:
    """How many requests there are, what is wrong with them (the first MOST_PROBLEMS), and the model of the first one.

    ``most_bytes`` of a line.
    """
    problems: list[LineProblem] = []
    known: set[str] = set()
    count = 0
    model = None
    too_many = f"a batch has at most {MOST_LINES} requests, in a file of at most {MOST_FILE_LINES} lines"
    try:
        for number, line in chain.from_iterable(pieces(path, most_bytes)):
            count += 1
            if count > MOST_LINES:
                raise TooManyLinesError(number)
            if problem := problem_of(line, endpoint, most_bytes, known):
                problem.line = number
                problems.append(problem)
                if len(problems) == MOST_PROBLEMS:
                    return count, problems, None
            elif count == 1:
                model = model_of(decode_request(line).body)
    except TooManyLinesError as error:
        return count, [LineProblem(code="too_many_tasks", message=too_many, line=error.number)], None
    if not count:
        problems.append(LineProblem(code="empty_file", message="the input file has no requests"))
    return count, problems, model


def problem_of(line: bytes, endpoint: str, most_bytes: int, known: set[str]) -> LineProblem | None:
    """What is wrong with a line, if anything; its id is added to those ``known``."""
    if len(line) > most_bytes:
        said = f"the line is larger than {most_bytes} bytes (--max-body-bytes)"
        return LineProblem(code="request_too_large", message=said)
    try:
        skim(b"[" * SPARE_LEVELS + line + b"]" * SPARE_LEVELS)
        request = decode_request(line)
    except msgspec.ValidationError as error:
        return LineProblem(code="invalid_request", message=f"custom_id, method, url and body are needed: {error}")
    except UNREADABLE:
        return LineProblem(code="invalid_json_line", message="this line is not parseable as valid JSON")
    if not request.custom_id or len(request.custom_id) > MOST_ID_CHARS:
        said = f"1 to {MOST_ID_CHARS} characters"
        return LineProblem(code="invalid_custom_id", message=said, param="custom_id")
    if request.custom_id in known:
        return LineProblem(code="duplicate_custom_id", message="an earlier line has this id", param="custom_id")
    known.add(request.custom_id)
    if request.method != "POST":
        return LineProblem(code="invalid_method", message="the method is POST", param="method")
    if request.url != endpoint:
        return LineProblem(code="invalid_url", message=f"the batch is for {endpoint}", param="url")
    if not bytes(request.body).lstrip().startswith(b"{"):
        return LineProblem(code="invalid_body", message="an object", param="body")
    return None


def model_of(body: msgspec.Raw) -> str | None:
    """The model that is asked, if that can be read."""
    try:
        found = decode_mode(body).model
    except UNREADABLE:
        return None
    return found if isinstance(found, str) else None


def refusal(body: msgspec.Raw) -> str | None:
    """Why a batch cannot answer this, if it cannot; all else the route itself refuses."""
    try:
        mode = decode_mode(body)
    except UNREADABLE as error:
        return f"body: {error}"
    if mode.stream:
        return "stream: a batch is answered as a whole"
    if mode.background:
        return "background: a batch is in the background by itself"
    return None


def one_line(body: bytes) -> msgspec.Raw:
    return msgspec.Raw(encode(msgspec.json.decode(body)) if b"\n" in body else body)


class Progress:
    """The answers of a batch so far, in the files where they stay: they are what tells which requests are done.

    Blocks as long as the disk does; threads may share it. Raises OSError where the disk does, after which it has to be
    opened anew.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.done: set[str] = set()
        self.counts = RequestCounts()
        self.left = 0
        self.usage = UsageOfBatch()
        self._lock = threading.Lock()
        self._files = [self._open(path, is_error) for path, is_error in ((output, False), (errors, True))]

    def _open(self, path: Path, is_error: bool) -> int:
        """Counts what is there, and cuts off what was not written to its end, as a disk leaves it that lost power."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        end = 0
        with os.fdopen(os.dup(file), "rb") as content:
            for line in content:
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(decode_answer(line), is_error)
                except UNREADABLE as error:
                    said = "%s: an answer at byte %d cannot be read (%s); it and those behind it are asked for again"
                    logger.warning(said, path, end, error)
                    break
                end += len(line)
        os.ftruncate(file, end)
        return file

    def write(self, answer: AnswerLine) -> None:
        """Unless its request is done: a thread may come late whose caller was cancelled meanwhile."""
        is_error = answer.response is None or answer.response.status_code != 200
        line = encode(answer) + b"\n"
        with self._lock:
            if answer.custom_id in self.done:
                return
            file = self._files[is_error]
            written = os.write(file, line)
            if written != len(line):
                os.ftruncate(file, os.fstat(file).st_size - written)  # what is written next would go on with it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._count(answer, is_error)

    def counted(self) -> tuple[RequestCounts, UsageOfBatch]:
        """Both are of the same requests, whatever is written meanwhile."""
        with self._lock:
            return msgspec.structs.replace(self.counts), msgspec.structs.replace(self.usage)

    def leave(self, path: Path, code: str, message: str) -> None:
        """Has all requests that are not done end with this error; ``path`` is the input."""
        for piece in pieces(path):
            for _, line in piece:
                custom_id = decode_request(line).custom_id
                self.write(AnswerLine(fresh("batch_req_"), custom_id, None, ErrorOfLine(code, message)))

    def sync(self) -> tuple[int, int]:
        """Brings all to the disk; the bytes of answers and of errors."""
        for file in self._files:
            os.fsync(file)
        output, errors = (os.fstat(file).st_size for file in self._files)
        return output, errors

    def close(self) -> None:
        """Waits for a line that is being written; none is afterwards."""
        with self._lock:
            for file in self._files:
                os.close(file)
            self._files = []

    def _count(self, answer: AnswerLine, is_error: bool) -> None:
        found = None
        if not is_error and answer.response is not None:
            found = decode_usage(answer.response.body).usage
        self.done.add(answer.custom_id)
        self.left += answer.response is None
        if is_error:
            self.counts.failed += 1
        else:
            self.counts.completed += 1
        if found is None:
            return
        self.usage.input_tokens += found.prompt_tokens + found.input_tokens
        self.usage.output_tokens += found.completion_tokens + found.output_tokens
        for details in (found.prompt_tokens_details, found.input_tokens_details):
            self.usage.cached_tokens += (details.cached_tokens or 0) if details else 0
        for thought in (found.completion_tokens_details, found.output_tokens_details):
            self.usage.reasoning_tokens += (thought.reasoning_tokens or 0) if thought else 0
