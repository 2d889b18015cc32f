"""What tests of /v1/responses ask."""

from typing import Any

QUESTION = "What is the weather in Rome?"


def ask(server: Any, **fields: Any) -> Any:
    """The answer to a short question."""
    body = {"input": QUESTION, "temperature": 0, "max_output_tokens": 8, **fields}
    status, found = server.post("/v1/responses", body)
    assert status == 200, found
    return found
