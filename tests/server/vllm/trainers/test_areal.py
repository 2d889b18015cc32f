"""AReaL's own clients of SGLang's and vLLM's servers, unpatched: a rollout that is interrupted by other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
COUNT = 3000
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
    policy: Any,
    tmp_path: Path,
) -> None:
    python = environment("areal", *PACKAGES, dependencies=False)
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(policy(1), tmp_path / "model.safetensors")
    server = start_local(dtype="float32")
    arguments = [f"127.0.0.1:{server.port}", str(tmp_path), str(COUNT), str(tmp_path / "notes")]
    said = run(python, str(SCRIPT), dialect, *arguments)
    found = json.loads(said.strip().splitlines()[-1])
    tokens, logprobs, versions = found["tokens"], found["logprobs"], found["versions"]
    assert len(tokens) == len(logprobs) == len(versions) == COUNT and found["reason"] == "length"
    begun = versions.count(0)
    assert 0 < begun < COUNT and versions == [0] * begun + [1] * (COUNT - begun)
    # Every token, in its place, is as likely as the weights say that sampled it: none is lost and none repeated.
    prompt = [504, 2365, 6354, 16438]

    def scored() -> list[float]:
        body = {"input_ids": prompt + tokens, "sampling_params": {"max_new_tokens": 0}}
        status, answer = server.post("/generate", body | {"return_logprob": True, "logprob_start_len": len(prompt)})
        assert status == 200, answer
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]

    now = scored()
    assert found["scores"] == pytest.approx(now[-len(found["scores"]) :], abs=1e-4)
    assert logprobs[begun:] == pytest.approx(now[begun:], abs=1e-3)
    server.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    assert logprobs[:begun] == pytest.approx(scored()[:begun], abs=1e-3)
    assert logprobs[begun:] != pytest.approx(scored()[begun:], abs=1e-1)
