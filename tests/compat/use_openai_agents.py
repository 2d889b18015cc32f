"""openai-agents over responses, and over chat."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from checks import QUESTION, feature, run
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


SHORT = "What is the capital of France?"
"""Its answer ends by itself: an answer that is cut off is an error to this client."""
CALLED: list[str] = []


@function_tool
def weather(city: Literal["Rome", "Bern"]) -> str:
    """The weather of a city."""
    CALLED.append(city)
    return "22 degrees"


def model_of(kind: Any, url: str, model: str) -> Any:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    return kind(model=model, openai_client=client)


def typed(kind: Any, url: str, model: str) -> None:
    agent = Agent(
        name="a", model=model_of(kind, url, model), output_type=Weather, model_settings=ModelSettings(max_tokens=300)
    )
    assert isinstance(Runner.run_sync(agent, QUESTION).final_output, Weather)


def uses_tool(kind: Any, url: str, model: str) -> None:
    CALLED.clear()
    agent = Agent(
        name="a",
        model=model_of(kind, url, model),
        tools=[weather],
        tool_use_behavior="stop_on_first_tool",
        model_settings=ModelSettings(tool_choice="required", max_tokens=300, parallel_tool_calls=False),
    )
    assert Runner.run_sync(agent, QUESTION).final_output == "22 degrees"
    assert CALLED and CALLED[0] in ("Rome", "Bern")


def hands_off(kind: Any, url: str, model: str) -> None:
    settings = ModelSettings(temperature=0, max_tokens=1000)
    second = Agent(name="second", model=model_of(kind, url, model), model_settings=settings)
    first = Agent(
        name="first",
        model=model_of(kind, url, model),
        handoffs=[second],
        model_settings=ModelSettings(tool_choice="required", max_tokens=100, parallel_tool_calls=False),
    )
    assert Runner.run_sync(first, SHORT).last_agent is second


def streams(kind: Any, url: str, model: str) -> None:
    settings = ModelSettings(temperature=0, max_tokens=1000)
    agent = Agent(name="a", model=model_of(kind, url, model), model_settings=settings)

    async def events() -> list[str]:
        found = Runner.run_streamed(agent, SHORT)
        return [event.type async for event in found.stream_events()]

    assert "raw_response_event" in asyncio.run(events())


for name, kind in (("responses", OpenAIResponsesModel), ("chat", OpenAIChatCompletionsModel)):
    for what, function in (("typed output", typed), ("tool", uses_tool), ("handoff", hands_off), ("streamed", streams)):
        feature(f"{name}: {what}")(lambda url, model, function=function, kind=kind: function(kind, url, model))

if __name__ == "__main__":
    run()
