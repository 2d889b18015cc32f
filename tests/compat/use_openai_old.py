"""The OpenAI client from before its version 1.0, whose chats call functions: python use_openai_old.py URL MODEL"""

from __future__ import annotations

import json
from typing import Any

import openai
from checks import feature, run

MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"]},
}


def chat(url: str, model: str, **fields: Any) -> Any:
    openai.api_base, openai.api_key = f"{url}/v1", "unused"
    return openai.ChatCompletion.create(model=model, **{"messages": MESSAGES, "temperature": 0} | fields)


@feature("chat, streamed")
def chats(url: str, model: str) -> None:
    whole = chat(url, model, max_tokens=12).choices[0].message.content
    chunks = chat(url, model, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.get("content") or "" for chunk in chunks) == whole


@feature("completions")
def completions(url: str, model: str) -> None:
    openai.api_base, openai.api_key = f"{url}/v1", "unused"
    found = openai.Completion.create(model=model, prompt=["One", "Two"], max_tokens=4, logprobs=2, echo=True)
    assert [choice.text[:3] for choice in found.choices] == ["One", "Two"]


@feature("functions: named, streamed, history")
def functions(url: str, model: str) -> None:
    asked = {"functions": [WEATHER], "max_tokens": 100}
    [choice] = chat(url, model, function_call={"name": "weather"}, **asked).choices
    assert choice.finish_reason == "function_call"
    called = choice.message.function_call
    assert called.name == "weather" and json.loads(called.arguments)["city"] in ("Rome", "Bern")
    said: dict[str, str] = {}
    for chunk in chat(url, model, function_call={"name": "weather"}, stream=True, **asked):
        for name, text in chunk.choices[0].delta.get("function_call", {}).items():
            said[name] = said.get(name, "") + text
    assert said == called.to_dict()
    result = {"role": "function", "name": "weather", "content": "22 degrees"}
    history = [*MESSAGES, choice.message.to_dict_recursive(), result]
    assert chat(url, model, messages=history, functions=[WEATHER], function_call="none", max_tokens=8).choices


if __name__ == "__main__":
    run()
