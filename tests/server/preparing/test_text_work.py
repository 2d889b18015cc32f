"""Bodies are read where they hold up nobody: the same answer from everywhere, and limits for what runs in processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slipstream.server.config import ServerConfig
from slipstream.server.errors import ApiError, InvalidRequestError
from slipstream.server.jobs import JOBS
from slipstream.server.preparing import text_work
from slipstream.server.preparing.prepared import Limits, Prepared
from slipstream.server.preparing.text_model import TextModel, load_text_model
from slipstream.server.preparing.text_work import INLINE_BYTES, THREAD_BYTES, TextWork

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}{% endfor %}{{ extra or '' }}"
)
ENDLESS = (
    "{% for a in range(10**5) %}{% for b in range(10**5) %}{% for c in range(10**5) %}{% endfor %}" + "{% endfor %}" * 2
)
LIMITS = Limits(
    model_names=("tiny",),
    max_model_len=40_000,
    vocab_size=257,
    max_prompts=8,
    unknown_fields="error",
    request_templates="elsewhere",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and one special token."""
    path: Path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.add_special_tokens(["<|start|>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    return path


@pytest.fixture(scope="module")
def text(folder: Path) -> TextModel:
    return load_text_model(str(folder), ServerConfig())


@pytest.fixture
async def work(folder: Path, text: TextModel) -> AsyncIterator[TextWork]:
    made = TextWork(str(folder), ServerConfig(), LIMITS, text)
    yield made
    await made.close()


def chat(content: str, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


@pytest.fixture(autouse=True)
def _others() -> Iterator[None]:
    """Servers of other tests run in this process, too, and may have workers."""
    OTHERS.clear()
    OTHERS.update(each.pid for each in workers())
    yield
    OTHERS.clear()


OTHERS: set[int] = set()


def workers() -> list[psutil.Process]:
    """Workers of this test, not of servers that other tests have started."""

    def is_one(child: psutil.Process) -> bool:
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # it ends while it is looked at
            return "slipstream.server.preparing.text_worker" in child.cmdline()
        return False

    return [child for child in psutil.Process().children() if is_one(child) and child.pid not in OTHERS]


async def test_every_place_gives_the_same(work: TextWork, text: TextModel) -> None:
    for size in (30, INLINE_BYTES + 10, THREAD_BYTES + 10):
        words = "one, two – " * (size // 11)
        for job, raw in (
            ("chat", chat(words, seed=5, chat_template_kwargs={"extra": "…"}, foo=None)),
            ("complete", json.dumps({"prompt": [words, "b"], "echo": True, "logit_bias": {"3": 1}}).encode()),
            ("complete", json.dumps({"prompt": [[7] * (size // 4), [256, 0]], "stop": ["x"]}).encode()),
            ("tokenize", json.dumps({"prompt": words, "return_token_strs": True}).encode()),
            ("detokenize", json.dumps({"tokens": [65, 66, 255] * (size // 8)}).encode()),
        ):
            expected = JOBS[job](text, LIMITS, raw)
            found = await work.run(job, raw)
            assert found == expected
            if isinstance(found, Prepared):
                assert found.prompts[0]
    for raw in (
        chat("x" * THREAD_BYTES, temperature=7),
        chat("x" * THREAD_BYTES, foo={"a": 1}),
        b"[" * THREAD_BYTES * 2,
    ):
        with pytest.raises(InvalidRequestError) as here:
            JOBS["chat"](text, LIMITS, raw)
        with pytest.raises(InvalidRequestError) as there:
            await work.run("chat", raw)
        assert there.value.body() == here.value.body()


async def test_what_threads_reserve_is_not_taken_for_what_a_request_needs(work: TextWork) -> None:
    """Grammars are compiled in threads, for each of which an allocator may reserve half of what a job may have."""
    await work.run("detokenize", json.dumps({"tokens": [65] * THREAD_BYTES}).encode())
    [worker] = workers()
    before = worker.memory_info().vms
    names = [f"property {number}" for number in range(300)]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names}
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert (await work.run("chat", chat("x", **asked))).structure is not None
    assert worker.memory_info().vms - before < 48 * 2**20


async def test_a_template_without_end_ends_with_its_request(work: TextWork) -> None:
    hostile = [asyncio.create_task(work.run("chat", chat("x", chat_template=ENDLESS))) for _ in range(3)]
    while len(workers()) < 2 and not any(task.done() for task in hostile):  # their time goes on, whatever stands still
        await asyncio.sleep(0.05)
    assert (await work.run("chat", chat("y" * THREAD_BYTES))).prompts  # others are not kept waiting
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    assert (await work.run("chat", chat("y", chat_template="{{ messages[0].content }}!"))).prompts == [
        (await work.run("complete", b'{"prompt":"y!"}')).prompts[0]
    ]
    stuck = asyncio.create_task(work.run("chat", chat("x", chat_template=ENDLESS)))
    await asyncio.sleep(0.5)
    await work.close()  # a shutdown
    assert not workers()
    with pytest.raises(ApiError):
        await stuck


async def test_time_and_memory_of_a_job_are_limited(
    folder: Path, text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_work, "TEMPLATE_CPU_S", 0.5)
    work = TextWork(str(folder), ServerConfig(), LIMITS, text)
    try:
        with pytest.raises(InvalidRequestError) as error:
            await work.run("chat", chat("x", chat_template=ENDLESS))
        assert error.value.code == "too_complex"
        wrong = ",".join(f'"a{index}":"a"' for index in range(200_000))
        with pytest.raises(InvalidRequestError) as error:
            await work.run("complete", f'{{"prompt":"x","logit_bias":{{{wrong}}}}}'.encode())
        assert error.value.code == "too_complex"
        assert (await work.run("chat", chat("y" * THREAD_BYTES))).prompts
    finally:
        await work.close()
    assert not workers()


async def test_a_text_that_cannot_fit_is_not_tokenized(work: TextWork) -> None:
    long = json.dumps({"prompt": "a" * (LIMITS.max_model_len * 20)}).encode()
    for job in ("tokenize", "complete"):
        with pytest.raises(InvalidRequestError) as error:
            await work.run(job, long)
        assert error.value.code == "context_length_exceeded"
