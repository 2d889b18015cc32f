"""The OpenAI client: chat, completions, responses, embeddings."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import openai
from checks import QUESTION, feature, run
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


class Report(BaseModel):
    places: list[Weather] = Field(min_length=1, max_length=2)


MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
CHOICES: tuple[Any, ...] = ("required", {"type": "function", "function": {"name": "Weather"}})


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@feature("chat, streamed, log-probabilities")
def chat(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client(url).chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    with client(url).chat.completions.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == whole.choices[0].message.content
    assert whole.choices[0].logprobs and len(whole.choices[0].logprobs.content or ()) == 12


@feature("completions")
def completions(url: str, model: str) -> None:
    found = client(url).completions.create(model=model, prompt=["One", "Two"], max_tokens=4, echo=True, logprobs=1)
    assert [choice.text[:3] for choice in found.choices] == ["One", "Two"]


@feature("structured output: parse, streamed")
def structured(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 300, "response_format": Report}
    assert isinstance(client(url).chat.completions.parse(**asked).choices[0].message.parsed, Report)
    with client(url).chat.completions.stream(**asked) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Report)


@feature("tools: required, named, none, auto, history")
def tools(url: str, model: str) -> None:
    tool = openai.pydantic_function_tool(Weather)
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 300, "tools": [tool]}
    chat = client(url).chat.completions
    for choice in CHOICES:
        answer = chat.parse(**asked, tool_choice=choice)
        calls = answer.choices[0].message.tool_calls
        assert calls and all(isinstance(call.function.parsed_arguments, Weather) for call in calls), answer
        assert answer.choices[0].finish_reason == "tool_calls"
    assert not chat.create(**(asked | {"max_tokens": 20}), tool_choice="none").choices[0].message.tool_calls
    auto = chat.create(**asked, tool_choice="auto").choices[0]
    assert auto.message.content or auto.message.tool_calls
    results = [{"role": "tool", "tool_call_id": call.id, "content": json.dumps("sunny")} for call in calls]
    history = [*MESSAGES, answer.choices[0].message, *results]
    assert chat.create(**(asked | {"messages": history, "max_tokens": 20})).choices


@feature("tools, streamed")
def tools_streamed(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 300}
    with client(url).chat.completions.stream(
        **asked, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        names = {event.name for event in stream if event.type == "tool_calls.function.arguments.delta"}
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert names == {"Weather"} and isinstance(call.function.parsed_arguments, Weather)


@feature("responses: text, streamed, kept, in the background")
def responses(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_output_tokens": 12}
    first = client(url).responses.create(**asked, input=QUESTION, instructions="Be brief.", temperature=0)
    with client(url).responses.stream(**asked, input="And Bern?", previous_response_id=first.id) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    assert client(url).responses.retrieve(first.id).output_text == first.output_text
    client(url).responses.delete(first.id)
    later = client(url).responses.create(model=model, input=QUESTION, background=True)
    assert client(url).responses.cancel(later.id).status in ("cancelled", "completed")


@feature("responses: parse, tools")
def responses_structured(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "input": QUESTION, "max_output_tokens": 300}
    assert isinstance(client(url).responses.parse(**asked, text_format=Report).output_parsed, Report)
    tool: Any = openai.pydantic_function_tool(Weather)["function"]
    with client(url).responses.stream(
        **asked, tools=[{"type": "function", **tool}], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        [call] = stream.get_final_response().output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)


@feature("files, batches")
def batches(url: str, model: str) -> None:
    made = client(url)
    body = {"model": model, "messages": MESSAGES, "max_tokens": 8}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    file = made.files.create(file=("in.jsonl", line.encode()), purpose="batch")
    batch = made.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert batch.id in [each.id for each in made.batches.list(limit=1)]
    deadline = time.monotonic() + 600
    while (batch := made.batches.retrieve(batch.id)).status != "completed":
        assert time.monotonic() < deadline and batch.status in ("validating", "in_progress", "finalizing")
        time.sleep(0.5)
    [answer] = made.files.content(batch.output_file_id or "").text.splitlines()
    assert json.loads(answer)["response"]["body"]["choices"][0]["message"]["content"]
    assert made.files.delete(file.id).deleted


@feature("responses: input_tokens")
def input_tokens(url: str, model: str) -> None:
    counted = client(url).responses.input_tokens.count(model=model, input=QUESTION)
    asked = client(url).responses.create(model=model, input=QUESTION, max_output_tokens=1)
    assert asked.usage and counted.input_tokens == asked.usage.input_tokens


@feature("embeddings")
def embeddings(url: str, model: str) -> None:
    found = client(url).embeddings.create(model=model, input=["One", "Two"], dimensions=16)
    assert [len(each.embedding) for each in found.data] == [16, 16]


if __name__ == "__main__":
    run()
