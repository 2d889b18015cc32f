"""What slime calls of an external rollout engine, in its order, and what it reads of the answers.

The calls are those of its pages on external engines and of the code behind them; the trainer's side of the process
group is a process of its own (trainer.py).
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ports import free_port
from tests.server.sglang.calls import flattened, shared
from tests.server.under_way import slow_steps
from tests.server.vllm.sending import beside, broadcast, info, named_group, post, with_weights

PROMPT = [504, 2632, 6354, 16438, 28]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
GROUP = "slime-pp_0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any, tiny_model: Path, policy: Any) -> Callable[[int], Path]:
    """A folder with the weights of a step."""

    return lambda seed: with_weights(tiny_model, tmp_path_factory.mktemp(f"weight_v{seed:06}"), policy(seed))


@pytest.fixture(scope="module")
def engine(start_local: Callable[..., Any]) -> Any:
    return start_local(max_running=8)


class Slime:
    """One engine as slime sees it."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def post(self, path: str, **body: Any) -> Any:
        status, answer = self.server.post(path, body)
        assert status == 200, answer
        return answer

    def discover(self) -> dict[str, Any]:
        status, info = self.server.get("/server_info")
        assert status == 200
        assert int(info.get("num_gpus") or info["tp_size"] * info["pp_size"]) == 1
        assert info.get("disaggregation_mode") not in ("prefill", "decode") and not info.get("encoder_only")
        assert self.server.get("/health_generate")[0] == 200
        self.flush()
        assert self.server.get("/get_server_info")[1] == info | {"port": info["port"]}
        return dict(info)

    def flush(self) -> None:
        self.server.wait_until(lambda: self.server.request("GET", "/flush_cache")[0] == 200)

    def generate(self, **sampling: Any) -> Any:
        params = {"top_p": 1.0, "top_k": -1, "skip_special_tokens": False, "no_stop_trim": True} | GREEDY | sampling
        answer = self.post("/generate", input_ids=PROMPT, sampling_params=params, return_logprob=True)
        meta = answer["meta_info"]
        tokens = [item[1] for item in meta["output_token_logprobs"]]
        assert tokens == answer["output_ids"] and len(tokens) == meta["completion_tokens"]
        assert all(item[0] <= 0 for item in meta["output_token_logprobs"])
        return answer

    def abort_until_idle(self) -> None:
        def idle() -> bool:
            self.post("/abort_request", abort_all=True)
            status, answer = self.server.get("/v1/loads?include=core,disagg,queues")
            assert status == 200
            return not sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in answer["loads"])

        self.server.wait_until(idle)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        self.post("/pause_generation")
        self.flush()
        yield
        self.post("/continue_generation")

    def version(self) -> str:
        return str(self.server.get("/get_weight_version")[1]["weight_version"])


def said_after_reading(slime: Slime, folder: Path) -> list[int]:
    """What the engine says with the weights of a folder, which the first test holds against a server of its own."""
    slime.post("/update_weights_from_disk", model_path=str(folder))
    return list(slime.generate()["output_ids"])


def test_weights_from_disk(start_local: Callable[..., Any], engine: Any, saved: Any) -> None:
    slime = Slime(engine)
    slime.discover()
    before = slime.generate()
    folder = saved(1)
    with slime.updating():
        answer = slime.post("/update_weights_from_disk", model_path=str(folder), load_format=None, weight_version="1")
        assert answer["success"] is True
    after = slime.generate()
    assert (after["meta_info"]["weight_version"], slime.version()) == ("1", "1")
    assert after["meta_info"]["weight_versions"] == [{"version": "1", "start": 0, "end": 8}]
    assert after["meta_info"]["cached_tokens"] == 0, "nothing of the old weights is found"
    fresh = Slime(start_local(model=str(folder)))
    assert after["output_ids"] == fresh.generate()["output_ids"] != before["output_ids"]


def test_an_update_outside_a_pause_waits_for_answers(engine: Any, saved: Any) -> None:
    slime = Slime(engine)
    old, folder = slime.version(), saved(5)
    answers: list[Any] = []
    request = threading.Thread(target=lambda: answers.append(slime.generate(max_new_tokens=500)))
    with ThreadPoolExecutor(1) as threads:
        with slow_steps():
            request.start()
            engine.wait_until(lambda: engine.get("/v1/loads")[1]["loads"][0]["num_running_reqs"] == 1)
            asked = {"model_path": str(folder), "weight_version": "five"}
            updating = threads.submit(slime.post, "/update_weights_from_disk", **asked)
            engine.wait_until(lambda: engine.service.control.paused)
            assert request.is_alive() and not updating.done()
        updating.result(300)
    request.join(300)
    assert answers[0]["meta_info"]["weight_versions"] == [{"version": old, "start": 0, "end": 500}]
    assert slime.generate()["meta_info"]["weight_version"] == "five"


@pytest.mark.parametrize(("mode", "flush"), [("in_place", False), ("retract", True)])
def test_an_answer_tells_which_weights_sampled_which_tokens(engine: Any, saved: Any, mode: str, flush: bool) -> None:
    slime = Slime(engine)
    old, answers = slime.version(), list[Any]()
    request = threading.Thread(target=lambda: answers.append(slime.generate(max_new_tokens=1500)))
    before, folder = engine.metric("generation_tokens_total"), str(saved(7))
    with slow_steps():
        request.start()
        engine.wait_until(lambda: engine.metric("generation_tokens_total") > before + 5)
        slime.post("/pause_generation", mode=mode)
    slime.post("/update_weights_from_disk", model_path=folder, weight_version=f"to {mode}", flush_cache=flush)
    assert request.is_alive()
    slime.post("/continue_generation")
    request.join(300)
    meta = answers[0]["meta_info"]
    first, second = meta["weight_versions"]
    assert (first["version"], first["start"]) == (old, 0) and 5 < first["end"] == second["start"] < second[
        "end"
    ] == 1500
    assert second["version"] == meta["weight_version"] == slime.version() == f"to {mode}"


def test_an_update_that_fails_leaves_the_old_weights(engine: Any, tmp_path: Path) -> None:
    slime = Slime(engine)
    before, version = slime.generate()["output_ids"], slime.version()
    with slime.updating():
        status, answer = engine.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "9"})
        assert (status, answer["success"]) == (400, False) and answer["message"] == answer["error"]["message"]
    assert (slime.generate()["output_ids"], slime.version()) == (before, version)
    for body in ({"model_path": "x", "load_format": "delta"}, {"weight_version": "9"}):
        status, answer = engine.post("/update_weights_from_disk", body)
        assert (status, answer["success"]) == (400, False)
    status, answer = engine.post("/destroy_weights_update_group", {"group_name": "none"})
    assert (status, answer["success"]) == (400, False)


def test_a_partial_rollout(engine: Any) -> None:
    """Aborted, collected, sent again with what it has said, under other weights."""
    slime = Slime(engine)
    sampling = {"temperature": 1, "sampling_seed": 3, "max_new_tokens": 8000}
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(slime.generate(**sampling))) for _ in range(3)]
    with slow_steps():
        for thread in threads:
            thread.start()
        engine.wait_until(lambda: engine.get("/v1/loads")[1]["loads"][0]["num_running_reqs"] == 3)
        before = engine.metric("generation_tokens_total")
        engine.wait_until(lambda: engine.metric("generation_tokens_total") > before + 100)
        slime.abort_until_idle()
    for thread in threads:
        thread.join(300)
    for answer in answers:
        assert answer["meta_info"]["finish_reason"]["type"] == "abort" and answer["output_ids"]
    partial = max(answers, key=lambda answer: len(answer["output_ids"]))["output_ids"]
    again = slime.post("/generate", input_ids=PROMPT + partial, sampling_params=GREEDY, return_logprob=True)
    meta = again["meta_info"]
    assert meta["prompt_tokens"] == len(PROMPT) + len(partial)
    assert meta["prompt_tokens"] - meta["cached_tokens"] <= 2 * 16, "only what is not cached is computed"


@contextlib.contextmanager
def trainer(port: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("trainer.py")
    command = [sys.executable, "-P", str(script), str(port), GROUP, str(folder / "model.safetensors")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_weights_over_a_group(engine: Any, saved: Any, policy: Any) -> None:
    slime = Slime(engine)
    folder, port = saved(2), free_port()
    before = slime.generate()["output_ids"]
    with trainer(port, folder) as process:
        assert process.stdin is not None and process.stdout is not None
        answer = slime.post(
            "/init_weights_update_group",
            **{"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2},
            **{"group_name": GROUP, "backend": "gloo"},
        )
        assert answer["success"] is True and process.stdout.readline() == "joined\n"
        found = policy(2)
        names = list(found)
        with slime.updating():
            for bucket in (names[: len(names) // 2], names[len(names) // 2 :]):
                print(json.dumps(bucket), file=process.stdin, flush=True)
                answer = slime.post(
                    "/update_weights_from_distributed",
                    names=bucket,
                    dtypes=[str(found[name].dtype).removeprefix("torch.") for name in bucket],
                    shapes=[list(found[name].shape) for name in bucket],
                    **{"group_name": GROUP, "flush_cache": False, "weight_version": "2"},
                )
                assert answer["success"] is True and process.stdout.readline() == "sent\n"
        after = slime.generate()
        assert after["meta_info"]["weight_version"] == slime.version() == "2"
        assert after["output_ids"] != before
        # Some of the tensors only: the others stay, and the new ones serve when generation continues.
        with slime.updating():
            bucket = ["model.norm.weight"]
            print(json.dumps(bucket), file=process.stdin, flush=True)
            slime.post(
                "/update_weights_from_distributed",
                **{"names": bucket, "dtypes": ["float32"], "shapes": [list(found[bucket[0]].shape)]},
                **{"group_name": GROUP, "flush_cache": False, "weight_version": "3"},
            )
            assert slime.version() == "2"
        assert slime.version() == "3" and slime.generate()["output_ids"] == after["output_ids"]
        slime.post("/destroy_weights_update_group", group_name=GROUP)
    assert after["output_ids"] == said_after_reading(slime, folder)


def test_weights_over_a_group_in_one_broadcast(engine: Any, saved: Any, policy: Any) -> None:
    slime, port = Slime(engine), free_port()
    found = policy(3)
    told = {"master_address": "127.0.0.1", "master_port": str(port), "rank_offset": 1, "world_size": 2}
    with beside(post, engine, "/init_weights_update_group", told | {"group_name": "flat", "backend": "gloo"}):
        group = named_group(port, "flat")
    described = info(found)
    bucket = described | {
        "dtypes": described.pop("dtype_names"),
        "group_name": "flat",
        "load_format": "flattened_bucket",
    }
    with slime.updating(), beside(post, engine, "/update_weights_from_distributed", bucket):
        broadcast(group, flattened(found)["flattened_tensor"])
    slime.post("/destroy_weights_update_group", group_name="flat")
    assert slime.generate()["output_ids"] == said_after_reading(slime, saved(3))


def test_weights_that_are_shared_on_one_machine(engine: Any, saved: Any, policy: Any) -> None:
    slime = Slime(engine)
    folder, found, version = saved(6), policy(6), slime.version()
    names = list(found)
    pairs = [(name, found[name]) for name in names[:5]]
    bucket = flattened({name: found[name] for name in names[5:]})
    with slime.updating():
        for value, more in ((pairs, {}), (bucket, {"load_format": "flattened_bucket"})):
            assert slime.version() == version
            slime.post(
                "/update_weights_from_tensor", serialized_named_tensors=[shared(value)], weight_version="6", **more
            )
    after = slime.generate()
    assert after["meta_info"]["weight_version"] == slime.version() == "6"
    for text in ("no base64!", "\u1234", base64.b64encode(b"no pickle").decode(), shared([1, 2])):
        status, answer = engine.post("/update_weights_from_tensor", {"serialized_named_tensors": [text]})
        assert (status, answer["success"]) == (400, False)
    assert slime.generate()["output_ids"] == after["output_ids"] == said_after_reading(slime, folder)


def shared_bucket(names: list[str], found: dict[str, Tensor]) -> dict[str, Any]:
    return {"serialized_named_tensors": [shared([(name, found[name]) for name in names])]}


def test_weights_that_are_named_after_they_have_come(engine: Any, saved: Any, policy: Any) -> None:
    slime = Slime(engine)
    slime.post("/update_weights_from_disk", model_path=str(saved(4)), weight_version="4")
    names = list(policy(8))
    with slime.updating():
        slime.post("/update_weights_from_tensor", **shared_bucket(names[:2], policy(8)))
        slime.post("/update_weight_version", new_version="8", abort_all_requests=False)
    assert slime.version() == slime.generate()["meta_info"]["weight_version"] == "8"
    with slime.updating():
        slime.post("/update_weights_from_tensor", **shared_bucket(names[2:4], policy(8)))
        slime.post("/update_weights_from_tensor", **shared_bucket(names[4:], policy(8)), weight_version="whole")
    assert slime.version() == "whole"
    assert slime.generate()["output_ids"] == said_after_reading(slime, saved(8))


def test_who_begins_has_nothing_to_do_with_what_another_has_left(engine: Any, saved: Any, policy: Any) -> None:
    slime, base = Slime(engine), saved(4)
    slime.post("/update_weights_from_disk", model_path=str(base))
    before = slime.generate()["output_ids"]
    names = list(policy(9))
    slime.post("/update_weights_from_tensor", **shared_bucket(names[3:], policy(9)))  # and then the trainer is gone
    slime.post("/begin_weight_update", selector="all")
    slime.post("/update_weights_from_tensor", **shared_bucket(names[:3], policy(4)), selector="target")
    slime.post("/end_weight_update")
    assert slime.generate()["output_ids"] == before


def test_weights_of_a_drafter_are_not_taken_for_the_targets(engine: Any, policy: Any) -> None:
    slime = Slime(engine)
    before = slime.generate()["output_ids"]
    bucket = shared_bucket(list(policy(9)), policy(9)) | {"selector": "draft"}
    for path, body in (("/update_weights_from_tensor", bucket), ("/begin_weight_update", {"selector": "draft"})):
        status, answer = engine.post(path, body)
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "selector", "unsupported_parameter")
    assert slime.generate()["output_ids"] == before


def test_what_is_asked_about_weights(engine: Any, policy: Any, saved: Any) -> None:
    slime = Slime(engine)
    slime.post("/update_weights_from_disk", model_path=str(saved(4)), weight_version="4")
    served = {"float32": torch.float32, "bfloat16": torch.bfloat16}[engine.get("/server_info")[1]["dtype"]]
    expected = {name: tensor.to(served).float() for name, tensor in policy(4).items()}
    rows = slime.post("/get_weights_by_name", name="model.embed_tokens.weight", truncate_size=3)
    assert rows == expected["model.embed_tokens.weight"][:3].tolist()
    assert slime.post("/get_weights_by_name", name="model.norm.weight") == expected["model.norm.weight"][:100].tolist()
    assert engine.post("/get_weights_by_name", {"name": "nothing"})[0] == 400
    assert slime.post("/weights_checker", action="snapshot")["success"] is True
    assert slime.post("/weights_checker", action="compare")["success"] is True
    sums = slime.post("/weights_checker", action="checksum")
    assert set(sums["ranks"][0]["checksums"]) == set(expected)
    slime.post("/update_weights_from_disk", model_path=str(saved(1)), weight_version="1")
    status, answer = engine.post("/weights_checker", {"action": "compare"})
    assert (status, answer["success"]) == (400, False)
    assert slime.post("/weights_checker")["per_engine_checksum"] != sums["per_engine_checksum"]


def test_memory_is_given_back_and_taken_again(engine: Any) -> None:
    slime = Slime(engine)
    before = slime.generate()["output_ids"]
    for tags in ({"tags": ["kv_cache"]}, {"tags": ["weights", "kv_cache", "cuda_graph"]}, {}, {"tags": None}):
        slime.flush()
        slime.post("/release_memory_occupation", **tags)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda answers=answers: answers.append(slime.generate()))
        waiting.start()
        slime.post("/resume_memory_occupation", **tags)
        waiting.join(300)
        assert answers[0]["output_ids"] == before
