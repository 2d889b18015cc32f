"""pydantic-ai: typed outputs in its ways, and tools, over chat and over responses."""

from __future__ import annotations

from typing import Any, Literal

from checks import QUESTION, feature, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


def typed(kind: Any, url: str, name: str, output: Any) -> None:
    model = kind(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused"))
    agent = Agent(model, output_type=output, model_settings={"max_tokens": 300})
    found = agent.run_sync(QUESTION).output
    assert isinstance(found, Weather), found


@feature("chat: ToolOutput")
def tool_output(url: str, model: str) -> None:
    typed(OpenAIChatModel, url, model, ToolOutput(Weather))


@feature("chat: NativeOutput")
def native_output(url: str, model: str) -> None:
    typed(OpenAIChatModel, url, model, NativeOutput(Weather))


@feature("responses: ToolOutput")
def responses_tool(url: str, model: str) -> None:
    typed(OpenAIResponsesModel, url, model, ToolOutput(Weather))


@feature("responses: NativeOutput")
def responses_native(url: str, model: str) -> None:
    typed(OpenAIResponsesModel, url, model, NativeOutput(Weather))


@feature("text, streamed")
def text(url: str, model: str) -> None:
    import asyncio

    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused"))
    agent = Agent(chat, model_settings={"max_tokens": 12})

    async def stream() -> list[str]:
        async with agent.run_stream("Hello") as found:
            return [piece async for piece in found.stream_text(delta=True)]

    assert "".join(asyncio.run(stream()))


if __name__ == "__main__":
    run()
