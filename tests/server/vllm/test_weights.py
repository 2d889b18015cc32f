"""Weights on their ways to a server that generates: files, shared memory, groups; as vLLM, AReaL and TRL name them."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save

from slipstream.clients.adapters.group import TrainerGroup, send_packed
from slipstream.clients.adapters.trl import connect
from tests.ports import free_port
from tests.server.under_way import slow_steps
from tests.server.vllm.sending import (
    PROMPT,
    beside,
    broadcast,
    info,
    join,
    named_group,
    post,
    say,
    send_shared,
)

pytestmark = pytest.mark.usefixtures("as_it_was")
TRL_1_11 = """
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

class VLLMClient:
    def init_communicator(self, device=0):
        raise NotImplementedError("it takes a GPU")

    def send(self, tensors):
        arguments = NCCLTrainerSendWeightsArgs(group=self.communicator, packed=True)
        NCCLWeightTransferEngine.trainer_send_weights(iterator=tensors, trainer_args=arguments)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_group_of_vllm(trained: Any, policy: Any, said: list[Any], packed: bool) -> None:
    group = join(trained, packed)
    for version in (1, 0, 1):
        weights = policy(version)
        post(trained, "/start_weight_update", {"is_checkpoint_format": True})
        with beside(post, trained, "/update_weights", {"update_info": info(weights)}):
            if packed:
                send_packed(iter(weights.items()), group)
            else:
                for tensor in weights.values():
                    group.broadcast(tensor)
        post(trained, "/finish_weight_update", {"weight_version": f"v{version}"})
        assert say(trained) == said[version]
        assert trained.get("/weight_info")[1] == {"weight_version": f"v{version}"}
    assert post(trained, "/shutdown_weight_transfer_engine") == {"message": "Weight transfer shut down"}
    assert post(trained, "/update_weights", {"update_info": info(policy(0))}, status=400)["error"]["message"]


def test_nothing_is_seen_before_the_end_and_spans_tell_where_it_was(trained: Any, policy: Any, said: list[Any]) -> None:
    names = list(policy(1))
    post(trained, "/update_weight_version", {"new_version": "old"})
    wanted = {"temperature": 0, "max_tokens": 2000, "ignore_eos": True}
    with ThreadPoolExecutor(1) as threads:
        post(trained, "/start_weight_update")
        for part in (names[:3], names[3:]):
            send_shared(trained, {name: policy(1)[name] for name in part})
            if part == names[:3]:
                assert say(trained) == said[0]
        before = trained.metric("generation_tokens_total")
        with slow_steps():
            body = {"token_ids": PROMPT, "sampling_params": wanted}
            long = threads.submit(trained.post, "/inference/v1/generate", body)
            trained.wait_until(lambda: trained.metric("generation_tokens_total") > before)
            post(trained, "/finish_weight_update", {"weight_version": "new"})
        assert say(trained) == said[1]
        status, reply = long.result(300)
    assert status == 200
    first, second = reply["choices"][0]["weight_versions"]
    assert (first["version"], first["start"], second["version"], second["end"]) == ("old", 0, "new", 2000)
    assert 0 < first["end"] == second["start"] < 2000


def test_what_is_sent_without_a_beginning_serves_when_it_is_whole(trained: Any, policy: Any, said: list[Any]) -> None:
    weights = policy(1)
    names = list(weights)
    send_shared(trained, {name: weights[name] for name in names[1:]})
    assert say(trained) == said[0]
    send_shared(trained, {names[0]: weights[names[0]]})
    assert say(trained) == said[1]


def test_an_update_that_nobody_began_cannot_end(trained: Any) -> None:
    assert post(trained, "/finish_weight_update", status=409)["error"]["code"] == "no_update"


def test_what_cannot_be_taken_leaves_the_old_weights(trained: Any, policy: Any, said: list[Any]) -> None:
    post(trained, "/start_weight_update")
    norm = "model.norm.weight"
    data, part = save({norm: torch.zeros(7)}), save({norm: policy(1)[norm]})
    segment = shared_memory.SharedMemory(create=True, size=max(len(data), len(part)))
    segment.buf[: len(data)] = data
    asked = {"update_info": {"shared_memory": segment.name, "num_bytes": len(data)}}
    post(trained, "/update_weights", asked, status=400)
    # What comes after that is a part, however much of it there is.
    segment.buf[: len(part)] = part
    asked = {"update_info": {"shared_memory": segment.name, "num_bytes": len(part)}}
    assert post(trained, "/update_weights", asked, status=409)["error"]["code"] == "no_update"
    segment.close()
    segment.unlink()
    post(trained, "/finish_weight_update", status=409)
    assert say(trained) == said[0]


def test_an_end_waits_for_what_is_on_its_way(trained: Any, policy: Any, said: list[Any]) -> None:
    group = join(trained, packed=False)
    post(trained, "/start_weight_update")
    with ThreadPoolExecutor(2) as threads:
        receiving = threads.submit(post, trained, "/update_weights", {"update_info": info(policy(1))})
        trained.wait_until(lambda: trained.service.control._coming)
        ending = threads.submit(post, trained, "/finish_weight_update", {"weight_version": "whole"})
        with pytest.raises(TimeoutError):
            ending.result(0.5)
        assert say(trained) == said[0]
        for tensor in policy(1).values():
            group.broadcast(tensor)
        receiving.result(300)
        ending.result(300)
    assert say(trained) == said[1] and trained.get("/weight_info")[1] == {"weight_version": "whole"}


def test_whoever_has_joined_no_group_leaves_it_all_the_same(trained: Any) -> None:
    post(trained, "/init_weight_transfer_engine", {"init_info": {}})
    for _ in range(2):
        assert "message" in post(trained, "/shutdown_weight_transfer_engine")
        assert "message" in post(trained, "/close_communicator/")


@pytest.mark.parametrize("size", [{}, {"packed_buffer_size_bytes": 4096}])
def test_skyrl_calls_by_name(trained: Any, policy: Any, said: list[Any], size: dict[str, int]) -> None:
    group = join(trained, packed=False)
    weights = policy(1)

    def call(method: str, **kwargs: Any) -> None:
        assert post(trained, "/collective_rpc", {"method": method, "kwargs": kwargs}) == {"results": [None]}

    call("skyrl_start_weight_update", is_checkpoint_format=True)
    with ThreadPoolExecutor(1) as threads:
        asked = {"update_info": info(weights) | {"packed": True} | size}
        receiving = threads.submit(call, "update_weights_nccl", **asked)
        send_packed(iter(weights.items()), group, buffer_size_bytes=size.get("packed_buffer_size_bytes", 2**30))
        receiving.result(300)
    assert say(trained) == said[0]
    call("skyrl_finish_weight_update")
    assert say(trained) == said[1]
    reply = post(trained, "/collective_rpc", {"method": "execute_model"}, status=400)
    assert reply["error"]["param"] == "method"


# AReaL ---------------------------------------------------------------------------------------------------------------


def test_areal_updates_from_a_folder(trained: Any, other_model: Path, said: list[Any]) -> None:
    assert post(trained, "/areal_pause_generation")["success"] is True
    answers = ThreadPoolExecutor(1).submit(say, trained)
    trained.wait_until(lambda: trained.metric("num_requests_waiting") == 1)
    assert post(trained, "/areal_update_weights", {"model_path": str(other_model), "load_format": "auto"})["success"]
    assert not answers.done(), "an update ends no pause"
    assert post(trained, "/areal_continue_generation")["success"] is True
    assert answers.result(300) == said[1], "what waits is computed with the new weights"
    post(trained, "/areal_update_weights", {"model_path": "/nowhere"}, status=400)


def test_areal_sends_buckets_over_a_named_group(trained: Any, policy: Any, said: list[Any]) -> None:
    weights = policy(1)
    names, port = list(weights), free_port()
    told = {
        "master_address": "127.0.0.1",
        "master_port": str(port),
        "rank_offset": 1,
        "world_size": 2,
        "backend": "gloo",
        "group_name": "update_weight_group",
    }
    with beside(post, trained, "/areal_init_weights_update_group", told):
        group = named_group(port, "update_weight_group")
    post(trained, "/areal_pause_generation")
    for part in (names[:2], names[2:]):
        bucket = info({name: weights[name] for name in part})
        bucket |= {"dtypes": bucket.pop("dtype_names"), "group_name": "update_weight_group"}
        post(trained, "/areal_set_update_weight_meta", bucket)
        with beside(post, trained, "/areal_update_weights_xccl"):
            for name in part:
                broadcast(group, weights[name])
    post(trained, "/areal_continue_generation")
    assert say(trained) == said[1]
    assert post(trained, "/areal_update_weights_xccl", status=409)["error"]["code"] == "no_update"


def test_prime_rl_names_a_folder(trained: Any, policy: Any, said: list[Any], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save(policy(1)))
    post(trained, "/pause?mode=keep&clear_cache=false")
    answer = ThreadPoolExecutor(1).submit(say, trained)
    trained.wait_until(lambda: trained.metric("num_requests_waiting") == 1)
    post(trained, "/update_weights", {"weight_dir": str(tmp_path), "skip_prefix_cache_reset": True})
    assert not answer.done()
    post(trained, "/resume")
    assert answer.result(300) == said[1]
    for body in (
        {"weight_dir": str(tmp_path / "none")},
        {},
        {"weight_dir": str(tmp_path), "update_info": {"names": []}},
    ):
        post(trained, "/update_weights", body, status=400)
    assert say(trained) == said[1]


def test_the_weights_of_the_files_come_back(trained: Any, policy: Any, said: list[Any]) -> None:
    post(trained, "/start_weight_update")
    send_shared(trained, policy(1))
    post(trained, "/finish_weight_update", {"weight_version": "one"})
    post(trained, "/start_weight_update")
    with ThreadPoolExecutor(1) as threads:
        wanted = {"temperature": 0, "max_tokens": 3000, "ignore_eos": True}
        long = threads.submit(trained.post, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": wanted})
        trained.wait_until(lambda: trained.metric("num_requests_running") == 1)
        assert post(trained, "/reload_weights") == {"status": "ok"}
        status, reply = long.result(300)
    assert status == 200 and len(reply["choices"][0]["token_ids"]) == 3000
    assert [span["version"] for span in reply["choices"][0]["weight_versions"]] == ["one", "default"]
    assert trained.get("/weight_info")[1] == {"weight_version": "default"} and say(trained) == said[0]
    assert post(trained, "/finish_weight_update", status=409)["error"]["code"] == "no_update"


# TRL before 1.11 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
def test_trl_sends_parameters_behind_the_answers(trained: Any, policy: Any, said: list[Any], batched: bool) -> None:
    weights, port = policy(1), free_port()
    told = {"host": "127.0.0.1", "port": port, "world_size": 2, "client_device_uuid": "cpu"}
    assert "message" in post(trained, "/init_communicator/", told)
    group = TrainerGroup("127.0.0.1", port, 2, timeout_s=300)
    params = [
        {"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape)} for name, tensor in weights.items()
    ]
    if batched:
        post(trained, "/batch_update_named_params/", {"params": params})
    for param, tensor in zip(params, weights.values(), strict=True):
        if not batched:
            post(trained, "/update_named_param/", param)
        group.broadcast(tensor, src=1)
        if not batched:
            group.barrier()
    if batched:
        group.barrier()
    assert post(trained, "/reset_prefix_cache/")["message"].endswith("True")
    assert say(trained) == said[1]
    assert "message" in post(trained, "/close_communicator/")


def test_trl_between_two_ways_of_sending(
    trained: Any, policy: Any, said: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.11 and 1.12 join as later ones do, and send by what vLLM had before 0.28."""
    (tmp_path / "trl" / "generation").mkdir(parents=True)
    (tmp_path / "trl" / "generation" / "vllm_client.py").write_text(TRL_1_11)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("slipstream.clients.adapters.trl.find_spec", lambda name: None)
    weights = policy(1)
    with patch.dict(sys.modules):
        connect()
        client: Any = sys.modules["trl.generation.vllm_client"].VLLMClient()
    client.base_url, client.group_port, client.get_world_size = trained.url, free_port(), lambda: 1
    client._post = lambda url, json: post(trained, url.removeprefix(trained.url), json)
    client.init_communicator("cpu")
    post(trained, "/start_weight_update")
    with beside(post, trained, "/update_weights", {"update_info": info(weights) | {"packed": True}}):
        client.send(iter(weights.items()))
    post(trained, "/finish_weight_update")
    assert say(trained) == said[1]
    post(trained, "/shutdown_weight_transfer_engine")


def test_trl_is_told_at_the_next_call_what_went_wrong(trained: Any, said: list[Any]) -> None:
    post(trained, "/update_named_param/", {"name": "model.norm.weight", "dtype": "torch.float32", "shape": [4]})
    assert post(trained, "/reset_prefix_cache/", status=409)["error"]["code"] == "update_failed"
    assert post(trained, "/reset_prefix_cache/")["message"].endswith("True")
    assert say(trained) == said[0]
    anywhere = {"host": "0.0.0.0", "port": 5000, "world_size": 2}
    assert post(trained, "/init_communicator/", anywhere, status=400)["error"]["param"] == "host"


def test_updates_under_load_mix_no_weights(trained: Any, policy: Any) -> None:
    """Answers between updates are those of one version or the other."""
    answers: list[Any] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(trained.complete(PROMPT, max_tokens=1, temperature=0)["choices"][0]["text"])

    expected = set()
    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        for version in (1, 0, 1, 0, 1):
            post(trained, "/start_weight_update")
            send_shared(trained, policy(version))
            post(trained, "/finish_weight_update", {"weight_version": str(version)})
            expected.add(trained.complete(PROMPT, max_tokens=1, temperature=0)["choices"][0]["text"])
        stop.set()
        for each in asking:
            each.result(300)
    assert set(answers) <= expected
