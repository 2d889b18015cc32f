"""How tests call /generate."""

from __future__ import annotations

from typing import Any

PROMPT = [504, 2632, 6354, 16438, 28]
TEXT = "The quick brown fox"


def generate(server: Any, prompt: Any = None, **fields: Any) -> Any:
    """``prompt`` as ids unless it is a text; sampling parameters by their names, other fields by theirs."""
    sampling = {"max_new_tokens": 8, "temperature": 0, **fields.pop("sampling", {})}
    prompt = PROMPT if prompt is None else prompt
    first = prompt[0] if isinstance(prompt, list) else prompt
    name = "text" if isinstance(first, str) else "input_ids"
    body = {name: prompt, "sampling_params": sampling, **fields}
    status, answer = server.post("/generate", body)
    assert status == 200, answer
    return answer


def refused(server: Any, **body: Any) -> Any:
    status, answer = server.post("/generate", {"input_ids": PROMPT, **body})
    assert status == 400, answer
    return answer["error"]
