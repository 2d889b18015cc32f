"""LoRAs on their ways to a server: folders and groups; as vLLM, SkyRL and AReaL send them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slipstream.engine.testing.lora import random_lora, write_lora
from tests.ports import free_port
from tests.server.vllm.sending import PROMPT, beside, broadcast, info, named_group, post, say

pytestmark = pytest.mark.usefixtures("as_it_was")


def post_refused(server: Any, path: str, body: Any) -> Any:
    return post(server, path, body, status=400)


def write_policy_lora(folder: Path, policy: Any) -> dict[str, Tensor]:
    """A LoRA of one projection; the tensors."""
    shapes = {name: tensor.shape for name, tensor in policy(0).items() if ".layers.0." in name}
    tensors = random_lora(shapes, 2, 1, size=1.0, modules=("self_attn.q_proj",))
    write_lora(folder, tensors, scale=2.0)
    return tensors


def test_a_lora_answers_to_its_name(trained: Any, policy: Any, said: list[Any], tmp_path: Path) -> None:
    write_policy_lora(tmp_path / "lora", policy)
    for path, replaces in (("/v1/load_lora_adapter", False), ("/skyrl/v1/load_lora_adapter", True)):
        asked = {"lora_name": "policy-v1", "lora_path": str(tmp_path / "lora"), "load_inplace": replaces}
        body = json.dumps(asked).encode()
        status, headers, reply = trained.request("POST", path, body, {"content-type": "application/json"})
        assert status == 200 and headers["content-type"].startswith("text/plain"), reply
    with_it = trained.complete(PROMPT, max_tokens=8, temperature=0, model="policy-v1")
    assert with_it["choices"] != said[0] and with_it["model"] == "policy-v1"
    assert "policy-v1" in [card["id"] for card in trained.get("/v1/models")[1]["data"]]
    assert say(trained) == said[0], "the model itself"
    chat = [{"role": "user", "content": "Hi"}]
    without_engine = {
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [1]},
        "/v1/chat/completions/render": {"messages": chat},
        "/v1/messages/count_tokens": {"messages": chat},
    }
    for path, fields in without_engine.items():
        post(trained, path, fields | {"model": "policy-v1"})
    rendered = post(trained, "/v1/chat/completions/render", {"messages": chat, "model": "policy-v1"})
    assert rendered["model"] == "policy-v1"
    name = json.dumps({"lora_name": "policy-v1"}).encode()
    status, _, _ = trained.request("POST", "/v1/unload_lora_adapter", name, {"content-type": "application/json"})
    assert status == 200
    for path, fields in {**without_engine, "/v1/completions": {"prompt": PROMPT, "max_tokens": 1}}.items():
        post(trained, path, fields | {"model": "policy-v1"}, status=404)
    post(trained, "/v1/unload_lora_adapter", {"lora_name": "policy-v1"}, status=404)


def test_the_folder_of_a_model_is_no_lora(trained: Any, other_model: Path, said: list[Any]) -> None:
    asked = {"lora_name": "x", "lora_path": str(other_model)}
    assert "no folder of a LoRA" in post(trained, "/v1/load_lora_adapter", asked, status=400)["error"]["message"]
    asked = {"lora_name": "x", "lora_model_path": str(other_model), "lora_int_id": 1, "base_model_name": "tiny"}
    assert "no LoRA" in post(trained, "/areal_update_weights_lora", asked, status=400)["error"]["message"]
    assert say(trained) == said[0] and trained.get("/v1/models/x")[0] == 404


def test_areal_sends_loras(trained: Any, policy: Any, said: list[Any], tmp_path: Path) -> None:
    tensors = write_policy_lora(tmp_path / "lora", policy)
    about = {"lora_name": "lora-v1", "lora_int_id": 1, "base_model_name": "tiny"}
    post(trained, "/areal_update_weights_lora", {"lora_model_path": str(tmp_path / "lora"), **about})
    with_it = say(trained)
    assert with_it != said[0]
    port = free_port()
    told = {"master_address": "127.0.0.1", "master_port": str(port), "rank_offset": 1, "world_size": 2}
    with beside(post, trained, "/areal_init_weights_update_group", told | {"backend": "gloo", "group_name": "loras"}):
        group = named_group(port, "loras")
    bucket = info(tensors)
    bucket |= {"dtypes": bucket.pop("dtype_names"), "group_name": "loras", "lora_target_modules": ["q_proj"]}
    bucket |= about | {"lora_name": "lora-v2", "lora_rank": 2, "lora_alpha": 4, "lora_bias": "none"}
    post(trained, "/areal_set_update_weight_meta_lora", bucket)
    with beside(post, trained, "/areal_update_weights_lora_xccl", bucket):
        for tensor in tensors.values():
            broadcast(group, tensor)
    assert say(trained) == with_it, "the same LoRA, on the weights that served before the first"

    # One that fits no weight is given up at once, and generation continues.
    wrong = bucket | {"lora_name": "lora-v3", "names": [name.replace("q_proj", "nose") for name in tensors]}
    post(trained, "/areal_pause_generation")
    post(trained, "/areal_set_update_weight_meta_lora", wrong)
    with beside(post_refused, trained, "/areal_update_weights_lora_xccl", wrong):
        for tensor in tensors.values():
            broadcast(group, tensor)
    post(trained, "/areal_continue_generation")
    assert say(trained) == with_it
    for name in ("lora-v1", "lora-v2"):
        trained.request(
            "POST",
            "/v1/unload_lora_adapter",
            json.dumps({"lora_name": name}).encode(),
            {"content-type": "application/json"},
        )
