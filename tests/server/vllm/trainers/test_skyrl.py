"""SkyRL's own client, unpatched: every call, and a rollout that is frozen while other weights come."""

from __future__ import annotations

import json
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from slipstream.engine.testing.lora import random_lora, write_lora

pytestmark = pytest.mark.slow
PROMPT = [504, 2365, 6354, 16438]


def test_its_client(
    run: Any, environment: Callable[..., str], start_local: Callable[..., Any], policy: Any, tmp_path: Path
) -> None:
    python = environment("skyrl", "skyrl==0.3.0", dependencies=False)
    server = start_local(max_logprobs=-1)
    model = server.get("/v1/models")[1]["data"][0]["id"]
    shapes = {name: tensor.shape for name, tensor in policy(0).items() if ".layers.0." in name}
    write_lora(tmp_path / "lora", random_lora(shapes, 2, size=1.0, modules=("self_attn.q_proj",)), scale=2.0)
    data = save(policy(1))
    segment = SharedMemory(create=True, size=len(data))
    try:
        segment.buf[: len(data)] = data
        script = str(Path(__file__).with_name("skyrl_client.py"))
        arguments = [server.url, model, str(tmp_path / "lora"), segment.name, str(len(data))]
        said = json.loads(run(python, script, *arguments).splitlines()[-1])
    finally:
        segment.close()
        segment.unlink()
    rollout = said["rollout"]
    assert rollout["frozen"] and rollout["reason"] == "length"
    assert len(rollout["ids"]) == len(rollout["logprobs"]) == 12_000
    assert said["world_size"] == [1, 1]
    sample = said["sample"]
    assert len(sample["sequences"]) == 2 and all(len(one["tokens"]) == 4 for one in sample["sequences"])
    assert sample["prompt_logprobs"][0] is None and all(value <= 0 for value in sample["prompt_logprobs"][1:])
    assert [len(top) for top in sample["topk_prompt_logprobs"][1:]] == [2, 2, 2]
    assert said["render"]["token_ids"] and said["chat"]["choices"] and said["completion"]["choices"]
    assert said["texts"] == ["Hello there"]
    assert said["lora"]["model"] == "skyrl-lora"
