"""The command line ``llm`` and what it is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import QUESTION, feature, run

FOLDER = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(FOLDER)


def call(url: str, model: str, *arguments: str) -> str:
    (FOLDER / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {model}\n  api_base: {url}/v1\n  api_key_name: here\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )
    (FOLDER / "keys.json").write_text(json.dumps({"here": "unused"}))
    done: Any = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "here", "-o", "max_tokens", "200", *arguments],
        capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stderr)
    return str(done.stdout)


@feature("prompt, streamed")
def prompt(url: str, model: str) -> None:
    assert call(url, model, "Hello").strip()
    assert call(url, model, "--no-stream", "Hello").strip()


@feature("schema")
def schema(url: str, model: str) -> None:
    form = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"],
            "additionalProperties": False}  # fmt: skip
    assert json.loads(call(url, model, "--schema", json.dumps(form), QUESTION))["city"] in ("Rome", "Bern")


@feature("tools (the model may call them or not)")
def tools(url: str, model: str) -> None:
    call(url, model, "--functions", "def weather(city: str) -> str:\n    'Of a city'\n    return 'sunny'", QUESTION)


if __name__ == "__main__":
    run()
