"""instructor in its modes over chat completions: ``use_instructor.py URL``. Raises where something is amiss."""

from __future__ import annotations

import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Bern"]
    degrees: int = Field(ge=-20, le=45)


def main(url: str) -> None:
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    model = plain.models.list().data[0].id
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        found = client.chat.completions.create(
            model=model,
            response_model=Weather,
            messages=[{"role": "user", "content": "Rome has 22 degrees."}],
            max_tokens=200,
            max_retries=0,
        )
        assert isinstance(found, Weather), (mode, found)


if __name__ == "__main__":
    main(sys.argv[1])
