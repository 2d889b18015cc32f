"""instructor in its modes."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from checks import QUESTION, feature, run
from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


class Anything(BaseModel):
    """A small model does not follow a schema that is only told: that it writes JSON is enforced."""

    model_config = ConfigDict(extra="allow")


def ask(url: str, model: str, mode: Any, wanted: Any = Weather) -> None:
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    client = instructor.from_openai(plain, mode=mode)
    found = client.chat.completions.create(
        model=model,
        response_model=wanted,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=200,
        max_retries=0,
    )
    assert isinstance(found, wanted), found


@feature("TOOLS")
def tools(url: str, model: str) -> None:
    ask(url, model, instructor.Mode.TOOLS)


@feature("JSON_SCHEMA")
def json_schema(url: str, model: str) -> None:
    ask(url, model, instructor.Mode.JSON_SCHEMA)


@feature("JSON (of whatever form)")
def json_mode(url: str, model: str) -> None:
    ask(url, model, instructor.Mode.JSON, Anything)


@feature("RESPONSES_TOOLS")
def responses(url: str, model: str) -> None:
    ask(url, model, instructor.Mode.RESPONSES_TOOLS)


if __name__ == "__main__":
    run()
