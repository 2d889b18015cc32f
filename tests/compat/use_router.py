"""A router in front of the server, with its default options: ``use_router.py URL MODEL sglang|vllm``."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from checks import QUESTION, feature, run

KIND = sys.argv.pop(3)
MODULES = {"sglang": "sglang_router.launch_router", "vllm": "vllm_router.launch_router"}


@contextmanager
def routed(url: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tempfile.TemporaryFile()  # noqa: SIM115  # ended below
    process = subprocess.Popen(
        [sys.executable, "-m", MODULES[KIND], "--host", "127.0.0.1", "--port", str(port), "--worker-urls", url],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(600):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        log.seek(0)
        print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def post(url: str, path: str, body: Any) -> str:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        return str(urllib.request.urlopen(request, timeout=120).read().decode())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from None


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Bern"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip


@feature("chat, completions, streamed")
def plain(url: str, model: str) -> None:
    with routed(url) as router:
        messages = [{"role": "user", "content": QUESTION}]
        found = json.loads(
            post(router, "/v1/chat/completions", {"model": model, "messages": messages, "max_tokens": 8})
        )
        assert found["choices"][0]["message"]["content"]
        found = json.loads(post(router, "/v1/completions", {"model": model, "prompt": "One", "max_tokens": 8}))
        assert found["choices"][0]["text"]
        for path, body in (("/v1/chat/completions", {"messages": messages}), ("/v1/completions", {"prompt": "One"})):
            text = post(router, path, {"model": model, "max_tokens": 8, "stream": True, **body})
            assert text.rstrip().endswith("data: [DONE]"), text[-300:]


@feature("tools and structured output")
def structured(url: str, model: str) -> None:
    with routed(url) as router:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300}
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
        found = json.loads(post(router, "/v1/chat/completions", body | {"response_format": form}))
        assert json.loads(found["choices"][0]["message"]["content"])["city"] in ("Rome", "Bern")
        tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
        found = json.loads(post(router, "/v1/chat/completions", body | {"tools": [tool], "tool_choice": "required"}))
        assert found["choices"][0]["message"]["tool_calls"]


@feature("responses, embeddings")
def others(url: str, model: str) -> None:
    with routed(url) as router:
        found = json.loads(post(router, "/v1/responses", {"model": model, "input": QUESTION, "max_output_tokens": 8}))
        assert found["output"]
        assert json.loads(post(router, "/v1/embeddings", {"model": model, "input": "One"}))["data"]


if __name__ == "__main__":
    run()
