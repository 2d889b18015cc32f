"""verl's own server manager and client, with this project's replica: a rollout that other weights interrupt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
COUNT = 3000
PROMPT = [504, 2365, 6354, 16438]
PACKAGES = ["verl==0.9.1", "ray==2.60.0", "omegaconf==2.3.0", "hydra-core==1.3.2", "antlr4-python3-runtime==4.9.3"]
PACKAGES += [
    "tensordict==0.10.0",
    "pyvers",
    "cloudpickle",
    "codetiming",
    "orjson",
    "jsonschema",
    "jsonschema-specifications",
]
PACKAGES += ["referencing", "rpds-py", "msgpack", "protobuf", "cachetools"]


def test_its_rollout(
    run: Any,
    environment: Callable[..., str],
    start_local: Callable[..., Any],
    tiny_model: Path,
    other_model: Path,
    scores: Callable[..., list[float]],
) -> None:
    python = environment("verl", *PACKAGES, dependencies=False)
    server = start_local(dtype="float32")
    script = str(Path(__file__).with_name("verl_client.py"))
    found = json.loads(run(python, script, server.url, str(other_model), str(COUNT)).strip().splitlines()[-1])
    tokens, logprobs = found["tokens"], found["logprobs"]
    assert len(tokens) == len(logprobs) == COUNT and found["reason"] == "length"
    assert found["steps"] == [0, 7]
    assert found["waits"] and found["after"] == [4, 7]
    assert found["refused"] == [[], "aborted"] and found["again"] == [4, 8]

    # Every token, in its place, is as likely as one of the two policies says: none is lost and none repeated.
    new = scores(server, PROMPT, tokens)
    server.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    old = scores(server, PROMPT, tokens)
    close = [abs(said - one) < 1e-3 for said, one in zip(logprobs, old, strict=True)]
    begun = close.index(False)
    assert 0 < begun < COUNT
    assert logprobs[begun:] == pytest.approx(new[begun:], abs=1e-3)
