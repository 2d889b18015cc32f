"""verl's own server manager and client, with this project's replica: a rollout that other weights interrupt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

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
PACKAGES += ["referencing", "rpds-py", "msgpack", "protobuf"]


def test_its_rollout(
    run: Any,
    environment: Callable[..., str],
    start_local: Callable[..., Any],
    tiny_model: Path,
    policy: Any,
    tmp_path: Path,
) -> None:
    python = environment("verl", *PACKAGES, dependencies=False)
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(policy(1), tmp_path / "model.safetensors")
    server = start_local(dtype="float32")
    script = str(Path(__file__).with_name("verl_client.py"))
    found = json.loads(run(python, script, server.url, str(tmp_path), str(COUNT)).strip().splitlines()[-1])
    tokens, logprobs = found["tokens"], found["logprobs"]
    assert len(tokens) == len(logprobs) == COUNT and found["reason"] == "length"
    assert found["steps"] == [0, 7]
    assert found["waits"] and found["after"] == [4, 7]
    assert found["refused"] == [[], "aborted"] and found["again"] == [4, 8]

    def scored() -> list[float]:
        body = {"input_ids": PROMPT + tokens, "sampling_params": {"max_new_tokens": 0}}
        status, answer = server.post("/generate", body | {"return_logprob": True, "logprob_start_len": len(PROMPT)})
        assert status == 200, answer
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]

    # Every token, in its place, is as likely as one of the two policies says: none is lost and none repeated.
    new = scored()
    server.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    old = scored()
    close = [abs(said - one) < 1e-3 for said, one in zip(logprobs, old, strict=True)]
    begun = close.index(False)
    assert 0 < begun < COUNT
    assert logprobs[begun:] == pytest.approx(new[begun:], abs=1e-3)
