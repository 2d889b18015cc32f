"""Anthropic's client."""

from __future__ import annotations

import time
from typing import Any

import anthropic
from checks import QUESTION, feature, run

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)


@feature("messages, streamed")
def messages(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 12, "system": "Be brief."}
    asked["extra_body"] = {"temperature": 0}
    whole = client(url).messages.create(**asked)
    with client(url).messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason == "max_tokens"
    assert final.usage.output_tokens == whole.usage.output_tokens == 12


@feature("tools: any, named, auto, history, streamed")
def tools(url: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 300, "tools": [WEATHER]}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        with client(url).messages.stream(**asked, tool_choice=choice) as stream:
            final = stream.get_final_message()
        use = final.content[0]
        assert use.type == "tool_use" and use.input["city"] in ("Rome", "Bern")
    result = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "22 degrees"}
        for block in final.content
        if block.type == "tool_use"
    ]
    history = [
        *MESSAGES,
        final.to_param() if hasattr(final, "to_param") else {"role": "assistant", "content": final.content},
    ]
    history.append({"role": "user", "content": result})
    assert client(url).messages.create(**(asked | {"messages": history, "max_tokens": 12})).content


@feature("structured output")
def structured(url: str, model: str) -> None:
    form = {"type": "json_schema", "schema": WEATHER["input_schema"]}
    found = client(url).messages.create(
        model=model, messages=MESSAGES, max_tokens=100, extra_body={"output_config": {"format": form}}
    )
    assert found.content[0].type == "text" and '"city"' in found.content[0].text


@feature("count_tokens, errors")
def count(url: str, model: str) -> None:
    assert client(url).messages.count_tokens(model=model, messages=MESSAGES, tools=[WEATHER]).input_tokens > 10
    try:
        client(url).messages.create(model="nobody", messages=MESSAGES, max_tokens=1)
    except anthropic.NotFoundError as error:
        assert "nobody" in error.message
    else:
        raise AssertionError("there is no such model")


@feature("batches: results, list, cancel, delete")
def batches(url: str, model: str) -> None:
    batches = client(url).messages.batches
    params: Any = {"model": model, "messages": MESSAGES, "max_tokens": 8}
    batch = batches.create(requests=[{"custom_id": "a", "params": params}, {"custom_id": "b", "params": {"wrong": 1}}])  # type: ignore[typeddict-item, typeddict-unknown-key]
    assert batch.id in [each.id for each in batches.list(limit=1)]
    deadline = time.monotonic() + 600
    while batches.retrieve(batch.id).processing_status != "ended":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    found = {each.custom_id: each.result for each in batches.results(batch.id)}
    assert found["a"].type == "succeeded" and found["a"].message.content[0].type == "text"
    assert found["b"].type == "errored" and found["b"].error.error.type == "invalid_request_error"
    assert batches.delete(batch.id).id == batch.id
    long: Any = {**params, "max_tokens": 1000}
    batch = batches.create(requests=[{"custom_id": str(number), "params": long} for number in range(20)])
    assert batches.cancel(batch.id).processing_status in ("canceling", "ended")


if __name__ == "__main__":
    run()
