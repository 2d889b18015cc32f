"""litellm."""

from __future__ import annotations

import json
from typing import Any

import litellm
from checks import QUESTION, feature, run

MESSAGES = [{"role": "user", "content": QUESTION}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bern"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def common(url: str, model: str) -> dict[str, Any]:
    return {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0}


@feature("chat, streamed")
def chat(url: str, model: str) -> None:
    asked = common(url, model) | {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = litellm.completion(**asked).choices[0].message.content
    assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))


@feature("tools, streamed")
def tools(url: str, model: str) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    asked = common(url, model) | {"messages": MESSAGES, "max_tokens": 300, "tools": [tool], "tool_choice": "required"}
    for call in litellm.completion(**asked).choices[0].message.tool_calls:
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")
    chunks = list(litellm.completion(**asked, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built.choices[0].message.tool_calls


@feature("structured output")
def structured(url: str, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    asked = common(url, model) | {"messages": MESSAGES, "max_tokens": 100, "response_format": form}
    assert json.loads(litellm.completion(**asked).choices[0].message.content)["city"] in ("Rome", "Bern")


@feature("responses")
def responses(url: str, model: str) -> None:
    found = litellm.responses(**common(url, model), input=QUESTION, max_output_tokens=12)
    assert found.output


@feature("embeddings")
def embeddings(url: str, model: str) -> None:
    found = litellm.embedding(**common(url, model), input=["One", "Two"])
    assert len(found.data) == 2


if __name__ == "__main__":
    run()
