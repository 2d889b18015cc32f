"""The public OpenAI client, unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(default_server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{default_server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_models(client: openai.OpenAI, model: str) -> None:
    assert model == "SmolLM2-135M-Instruct.Q4_1"
    assert client.models.retrieve(model).object == "model"


def test_chat(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_completion_tokens=30)
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == "The capital of France is Paris."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens == 8  # seven of text and the end-of-turn token


def test_chat_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    with client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.system_fingerprint and {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == "The capital of France is Paris."


def test_choices(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Tell me a story."}], n=3, seed=7, max_tokens=20
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in reply.choices}) == 3


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == reply.choices[0].message.content
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or []).decode() == entry.token


def test_completions_of_token_ids(client: openai.OpenAI, model: str, default_server: Any) -> None:
    tokens = default_server.post("/tokenize", {"prompt": "The capital of France is"})[1]["tokens"]
    by_text = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=8)
    by_ids = client.completions.create(model=model, prompt=[tokens, tokens], temperature=0, max_tokens=8)
    assert [choice.text for choice in by_ids.choices] == [by_text.choices[0].text] * 2
    assert by_text.choices[0].finish_reason == "length"


def test_stop(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=[" 8", "nothing"]
    )
    assert reply.choices[0].text == " 5, 6, 7,"
    assert reply.choices[0].finish_reason == "stop"


def test_errors_have_their_classes(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=model, messages=QUESTION, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=model, messages=QUESTION, extra_body={"tempereture": 1})
    assert unknown.value.param == "tempereture"
    assert unknown.value.code == "unknown_parameter"


async def test_async_client_in_parallel(default_server: Any, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{default_server.url}/v1", api_key="unused", max_retries=0) as client:
        replies = await asyncio.gather(
            *(
                client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=30)
                for _ in range(8)
            )
        )
    assert {reply.choices[0].message.content for reply in replies} == {"The capital of France is Paris."}
