"""AReaL's own clients of SGLang's and vLLM's servers, unpatched: a rollout that is interrupted by other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
COUNT = 3000
PROMPT = [504, 2365, 6354, 16438]
SCRIPT = Path(__file__).with_name("areal_client.py")
PACKAGES = ["areal==1.0.4", "omegaconf==2.4.0.dev2", "hydra-core==1.4.0.dev1"]
PACKAGES += ["pybase64", "torchdata", "setproctitle", "colorlog", "tenacity", "lark", "ray", "protobuf", "msgpack"]
PACKAGES += [
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
    "numba==0.68.1",
    "llvmlite==0.50.0",
    "orjson",
    "einops",
    "aiofiles",
]


@pytest.mark.parametrize("dialect", ["sglang", "vllm"])
def test_its_client(
    dialect: str,
    run: Any,
    environment: Callable[..., str],
    start_local: Callable[..., Any],
    tiny_model: Path,
    other_model: Path,
    scores: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    python = environment("areal", *PACKAGES, dependencies=False)
    server = start_local(dtype="float32")
    arguments = [f"127.0.0.1:{server.port}", str(other_model), str(COUNT), str(tmp_path / "notes")]
    said = run(python, str(SCRIPT), dialect, *arguments)
    found = json.loads(said.strip().splitlines()[-1])
    tokens, logprobs, versions = found["tokens"], found["logprobs"], found["versions"]
    assert len(tokens) == len(logprobs) == len(versions) == COUNT and found["reason"] == "length"
    begun = versions.count(0)
    assert 0 < begun < COUNT and versions == [0] * begun + [1] * (COUNT - begun)
    # Every token, in its place, is as likely as the weights say that sampled it: none is lost and none repeated.
    now = scores(server, PROMPT, tokens)
    assert found["scores"] == pytest.approx(now[-len(found["scores"]) :], abs=1e-4)
    assert logprobs[begun:] == pytest.approx(now[begun:], abs=1e-3)
    server.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    assert logprobs[:begun] == pytest.approx(scores(server, PROMPT, tokens)[:begun], abs=1e-3)
    assert logprobs[begun:] != pytest.approx(scores(server, PROMPT, tokens)[begun:], abs=1e-1)
