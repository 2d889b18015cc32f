"""Typed outputs of pydantic-ai as a tool and natively: ``use_pydantic_ai.py URL``. Raises where something is amiss."""

from __future__ import annotations

import sys
from typing import Literal

import openai
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


def main(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        name = client.models.list().data[0].id
    model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused"))
    for kind in (ToolOutput(Weather), NativeOutput(Weather)):
        agent = Agent(model, output_type=kind, model_settings={"max_tokens": 300})
        found = agent.run_sync("Rome has 22 degrees.").output
        assert isinstance(found, Weather), (kind, found)
        assert found.city in ("Rome", "Bern")


if __name__ == "__main__":
    main(sys.argv[1])
