"""Structured output and tools with the OpenAI client: ``use_openai.py URL``. Raises where something is amiss."""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


class Report(BaseModel):
    places: list[Weather] = Field(min_length=1, max_length=2)


MESSAGES: list[Any] = [{"role": "user", "content": "Rome has 22 degrees. Answer as JSON."}]


def main(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    common: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": MESSAGES, "max_tokens": 300}

    parsed = client.chat.completions.parse(response_format=Report, **common).choices[0].message.parsed
    assert isinstance(parsed, Report), parsed
    with client.chat.completions.stream(response_format=Report, **common) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Report)

    tool = openai.pydantic_function_tool(Weather)
    for choice in ("required", {"type": "function", "function": {"name": "Weather"}}):
        answer = client.chat.completions.parse(tools=[tool], tool_choice=choice, **common)  # type: ignore[arg-type]
        calls = answer.choices[0].message.tool_calls
        assert calls and all(isinstance(call.function.parsed_arguments, Weather) for call in calls), answer
        assert answer.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        tools=[tool], tool_choice="required", parallel_tool_calls=False, **common
    ) as stream:
        names = {event.name for event in stream if event.type == "tool_calls.function.arguments.delta"}
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    assert names == {"Weather"} and isinstance(call.function.parsed_arguments, Weather)

    history = [*MESSAGES, answer.choices[0].message, *results(calls)]
    assert client.chat.completions.create(tools=[tool], **(common | {"messages": history, "max_tokens": 20})).choices
    auto = client.chat.completions.create(tools=[tool], tool_choice="auto", **common).choices[0]
    assert auto.message.content or auto.message.tool_calls


def results(calls: Any) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_call_id": call.id, "content": json.dumps("sunny")} for call in calls]


if __name__ == "__main__":
    main(sys.argv[1])
