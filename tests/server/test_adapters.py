"""LoRAs beside the model: loaded at the start and later, named by ``model`` in every dialect, there after a restart."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file

from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import NewRequest
from slipstream.server.config import ServerConfig
from slipstream.server.evolution.config import EvolutionConfig
from slipstream.server.launch import make_service
from slipstream.server.testing import start_in_thread, write_tiny_lora
from tests.server.sglang.calls import flattened, shared
from tests.server.under_way import slow_steps

PROMPT = [504, 2365, 6354, 16438]
MESSAGES = [{"role": "user", "content": "Say something."}]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs."""
    folder = tmp_path_factory.mktemp("loras")
    return [write_tiny_lora(folder / f"lora-{seed}", seed) for seed in range(3)]


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any], folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Has one of them from the start; its traffic may be kept."""
    traffic = {"traffic_log": "features", "traffic_folder": str(tmp_path_factory.mktemp("traffic"))}
    batches = str(tmp_path_factory.mktemp("batches"))
    return start_local(
        lora_modules=(f"first={folders[0]}",),
        served_model_name=("base",),
        batch_folder=batches,
        metrics_alias="vllm",
        **traffic,
    )


@pytest.fixture
def seen(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[NewRequest]]:
    """What the engine is asked for."""
    found: list[NewRequest] = []
    engine = server.service.engine
    submit = engine.submit

    def heard(request: NewRequest) -> Any:
        found.append(request)
        return submit(request)

    monkeypatch.setattr(engine, "submit", heard)
    yield found
    monkeypatch.undo()


def send(server: Any, path: str, **body: Any) -> tuple[int, str]:
    """The answers of these routes are texts."""
    status, found, reply = server.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
    assert status != 200 or found["content-type"].startswith("text/plain")
    return status, reply.decode()


def error(reply: str) -> Any:
    return json.loads(reply)["error"]


def said(server: Any, model: str) -> Any:
    return server.complete(PROMPT, max_tokens=12, model=model, ignore_eos=True, return_token_ids=True)["choices"][0]


def test_beside_the_model(server: Any, folders: list[Path]) -> None:
    base, first = said(server, "base"), said(server, "first")
    assert base != first
    assert send(server, LOAD, lora_name="second", lora_path=str(folders[1]))[0] == 200
    second = said(server, "second")
    assert second not in (base, first)
    assert (said(server, "base"), said(server, "first")) == (base, first), "the others stay"
    status, reply = send(server, LOAD, lora_name="second", lora_path=str(folders[2]))
    assert (status, error(reply)["param"]) == (400, "load_inplace")
    assert said(server, "second") == second
    assert send(server, "/skyrl" + LOAD, lora_name="second", lora_path=str(folders[2]), load_inplace=True)[0] == 200
    assert said(server, "second") not in (base, first, second)
    assert send(server, LOAD, lora_name="second", lora_path=str(folders[1]), load_inplace=True)[0] == 200
    assert said(server, "second") == second
    assert server.get("/weight_info")[1] == {"weight_version": "default"}
    assert send(server, UNLOAD, lora_name="second")[0] == 200
    status, answer = server.post("/v1/completions", {"prompt": PROMPT, "model": "second"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert send(server, UNLOAD, lora_name="second")[0] == 404


def test_what_is_refused(server: Any, folders: list[Path], tmp_path: Path) -> None:
    status, reply = send(server, LOAD, lora_name="base", lora_path=str(folders[1]), load_inplace=True)
    assert (status, error(reply)["param"]) == (400, "lora_name")
    status, reply = send(server, LOAD, lora_name="nowhere", lora_path=str(tmp_path / "nowhere"))
    assert status == 400 and "nowhere" in error(reply)["message"]
    assert server.get("/v1/models/nowhere")[0] == 404
    status, reply = send(server, UNLOAD, lora_name="base")
    assert status == 404
    about = {"lora_name": "first", "lora_int_id": 1, "base_model_name": "base"}
    status, reply = send(server, "/areal_update_weights_lora", lora_model_path=str(folders[1]), **about)
    assert status == 409 and "unload it first" in error(reply)["message"]


def test_cards(server: Any) -> None:
    base, first = server.get("/v1/models")[1]["data"]
    assert (base["id"], base["root"], base["parent"]) == ("base", "base", None)
    assert (first["id"], first["root"], first["parent"]) == ("first", "first", "base"), "no folder of this machine"
    assert server.get("/v1/models/first") == (200, first)


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 3},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/responses": {"input": "Say something.", "max_output_tokens": 3},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 3},
    "/v1/embeddings": {"input": "Something."},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 3}},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_every_dialect_names_it_by_model(server: Any, seen: list[NewRequest], path: str) -> None:
    for model, adapter in (("first", "first"), ("base", "")):
        status, answer = server.post(path, REQUESTS[path] | {"model": model})
        assert status == 200, answer
        assert answer["model"] == model
        assert (seen[-1].adapter, seen[-1].route) == (adapter, "lora:first" if adapter else "")
    status, answer = server.post(path, REQUESTS[path] | {"model": "none"})
    assert status == 404


def test_where_the_engine_is_not_asked(server: Any) -> None:
    """Names that came while the server ran are known there, too, also where large bodies are read."""
    for text in ("Something.", "Something. " * 4000):
        messages = [{"role": "user", "content": text}]
        for path, body in (
            ("/tokenize", {"prompt": text}),
            ("/tokenize", {"messages": messages}),
            ("/detokenize", {"tokens": [504] * len(text)}),
            ("/v1/chat/completions/render", {"messages": messages}),
            ("/v1/messages/count_tokens", {"messages": messages}),
        ):
            status, answer = server.post(path, body | {"model": "first"})
            assert status == 200, answer
            if path.endswith("render"):
                assert answer["model"] == "first"
            assert server.post(path, body | {"model": "none"})[0] == 404


def test_sglang_names_it_by_path(server: Any, seen: list[NewRequest]) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [PROMPT, PROMPT, PROMPT], "sampling_params": sampling, "lora_path": ["first", None, ""]}
    status, answers = server.post("/generate", body)
    assert status == 200, answers
    assert [request.adapter for request in seen] == ["first", "", ""]
    expected = [said(server, model)["token_ids"] for model in ("first", "base", "base")]
    assert [answer["output_ids"] for answer in answers] == expected
    status, answer = server.post("/generate", body | {"lora_path": "none"})
    assert (status, answer["error"]["param"]) == (400, "lora_path")


def test_nothing_is_learned_of_it(server: Any, seen: list[NewRequest]) -> None:
    """Drafters are for the model as it is: what it says with a LoRA is not kept, whatever its sender allows."""
    for model in ("first", "base"):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "model": model}).encode()
        told = {"content-type": "application/json", "x-slipstream-traffic": "features"}
        assert server.request("POST", "/v1/completions", body, told)[0] == 200
    assert [request.traffic for request in seen] == ["off", "features"]


def test_routers_see_which_are_in_use(server: Any) -> None:
    def shown(running: str, waiting: str) -> bool:
        lines = server.get("/metrics")[1].splitlines()
        [line] = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
        told = {f'running_lora_adapters="{running}"', f'waiting_lora_adapters="{waiting}"', 'max_lora="32"'}
        return set(line.partition("{")[2].partition("}")[0].split(",")) == told

    assert shown("", "")
    with server.suspended(), server.send("/v1/completions", REQUESTS["/v1/completions"] | {"model": "first"}):
        server.wait_until(lambda: shown("", "first"))
    server.wait_until(lambda: shown("", ""))
    with slow_steps(), server.open_stream(model="first"):
        server.wait_until(lambda: shown("first", ""))


def test_conversations_and_batches(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        turn = client.responses.create(model="first", input="Say something.", max_output_tokens=3)
        assert client.responses.retrieve(turn.id).model == "first"
        again = client.responses.create(model="base", input="More.", previous_response_id=turn.id, max_output_tokens=3)
        assert again.model == "base"
        lines = [
            {"custom_id": model, "method": "POST", "url": "/v1/completions", "body": {"model": model, "prompt": "A"}}
            for model in ("first", "base", "none")
        ]
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        file = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        done = server.wait_until(lambda: (b := client.batches.retrieve(batch.id)).status == "completed" and b)
        found = {}
        for name in (done.output_file_id, done.error_file_id):
            for line in client.files.content(name).text.splitlines():
                answer = json.loads(line)
                found[answer["custom_id"]] = answer["response"]
    assert {name: answer["status_code"] for name, answer in found.items()} == {"first": 200, "base": 200, "none": 404}
    assert found["first"]["body"]["model"] == "first"


def test_other_weights_and_sleep_leave_them(
    start_local: Callable[..., Any], folders: list[Path], tiny_model: Path
) -> None:
    server = start_local(lora_modules=(f"first={folders[0]}",), served_model_name=("base",))
    before = said(server, "base"), said(server, "first")
    status, reply = server.post("/areal_update_weights", {"model_path": str(tiny_model)})
    assert status == 200, reply
    assert (said(server, "base"), said(server, "first")) == before
    for level in (1, 2):
        assert server.post(f"/sleep?level={level}", {})[0] == 200
        assert server.post("/wake_up", {})[0] == 200
        assert (said(server, "base"), said(server, "first")) == before
    about = {"lora_name": "merged", "lora_int_id": 1, "base_model_name": "base"}
    assert server.post("/areal_update_weights_lora", {"lora_model_path": str(folders[1]), **about})[0] == 200
    found = said(server, "base"), said(server, "first")
    assert len({json.dumps(each) for each in (*found, *before)}) == 4, "beside the weights as they are now"
    assert said(server, "merged") == found[0]


def test_they_survive_the_engine(start_local: Callable[..., Any], folders: list[Path], tmp_path: Path) -> None:
    """Those whose folder is gone by then are unknown: the model itself does not answer in their place."""
    shutil.copytree(folders[1], tmp_path / "short-lived")
    server = start_local(lora_modules=(f"first={folders[0]}",), served_model_name=("base",))
    for name, folder in (("second", folders[1]), ("short-lived", tmp_path / "short-lived"), ("third", folders[2])):
        assert send(server, LOAD, lora_name=name, lora_path=str(folder))[0] == 200
    assert send(server, UNLOAD, lora_name="third")[0] == 200
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    memory = shared(list(load_file(folders[1] / "adapter_model.safetensors").items()))
    asked = {"lora_name": "memory", "config_dict": config, "serialized_named_tensors": [memory]}
    assert server.post("/load_lora_adapter_from_tensors", asked)[0] == 200
    before = {model: said(server, model) for model in ("base", "first", "second")}
    shutil.rmtree(tmp_path / "short-lived")
    engine = server.service.engine
    engine.kill()
    server.wait_until(lambda: server.service.engine is not engine)
    server.wait_until_ready()
    assert {model: said(server, model) for model in before} == before
    assert [card["id"] for card in server.get("/v1/models")[1]["data"]] == list(before)
    assert server.post("/v1/completions", {"prompt": PROMPT, "model": "short-lived"})[0] == 404
    server.wait_until_logged("'short-lived' could not be loaded again", "'memory' could not be loaded again")
    assert send(server, LOAD, lora_name="third", lora_path=str(folders[2]))[0] == 200


def test_one_more_takes_the_place_of_what_nobody_uses(start_local: Callable[..., Any], folders: list[Path]) -> None:
    server = start_local(lora_modules=(f"first={folders[0]}",), served_model_name=("base",), max_loras=3)
    names = lambda: [card["id"] for card in server.get("/v1/models")[1]["data"]][1:]  # noqa: E731
    for name in ("a", "b"):
        assert send(server, LOAD, lora_name=name, lora_path=str(folders[1]))[0] == 200
    before = said(server, "a")
    assert send(server, LOAD, lora_name="c", lora_path=str(folders[2]))[0] == 200
    assert names() == ["first", "a", "c"], "that which was named longest ago has left"
    assert server.post("/v1/completions", {"prompt": PROMPT, "model": "b"})[0] == 404
    with slow_steps(), server.open_stream(model="a"):
        server.wait_until(lambda: server.service.adapters._open)
        assert said(server, "c") != before
        assert send(server, LOAD, lora_name="nowhere", lora_path="/nowhere")[0] == 400
        assert names() == ["first", "a", "c"], "what cannot be loaded takes no place"
        for number in range(3):
            assert send(server, LOAD, lora_name=f"d{number}", lora_path=str(folders[2]))[0] == 200
        assert names() == ["first", "a", "d2"]
        status, answer = server.post(
            "/load_lora_adapter", {"lora_name": "e", "lora_path": str(folders[2]), "pinned": True}
        )
        assert (status, answer["success"], list(answer["loaded_adapters"])) == (200, True, ["first", "a", "e"])
        status, reply = send(server, LOAD, lora_name="f", lora_path=str(folders[1]))
        assert status == 409 and "--max-loras" in error(reply)["message"]
        assert send(server, LOAD, lora_name="a", lora_path=str(folders[1]), load_inplace=True)[0] == 200
    server.wait_until(lambda: not server.service.adapters._open)
    assert send(server, LOAD, lora_name="f", lora_path=str(folders[1]))[0] == 200
    assert names() == ["first", "e", "f"]
    assert said(server, "f") == before


def test_as_sglang_loads_them(server: Any, folders: list[Path]) -> None:
    asked = {"lora_name": "second", "lora_path": str(folders[1])}
    status, answer = server.post("/load_lora_adapter", asked)
    both = {"first": str(folders[0]), "second": str(folders[1])}
    assert (status, answer) == (200, {"success": True, "error_message": "", "loaded_adapters": both})
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "lora_path": "second"}
    assert server.post("/generate", body)[1]["output_ids"] == said(server, "second")["token_ids"]
    status, answer = server.post("/load_lora_adapter", asked)
    assert (status, answer["success"]) == (400, False) and "already" in answer["error_message"]
    status, answer = server.post("/unload_lora_adapter", {"lora_name": "second"})
    assert (status, answer["loaded_adapters"]) == (200, {"first": str(folders[0])})
    status, answer = server.post("/unload_lora_adapter", {"lora_name": "second"})
    assert (status, answer["success"]) == (404, False)


@pytest.mark.parametrize("field", ["serialized_named_tensors", "serialized_tensors"])
def test_as_sglang_gets_them_from_memory(server: Any, folders: list[Path], field: str) -> None:
    """A policy that sends its LoRA every step, under one name."""
    load, unload = "/load_lora_adapter_from_tensors", "/unload_lora_adapter"
    path = "/load_lora_adapter"
    matrices = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]

    def body(number: int, **changes: Any) -> Any:
        text = shared(flattened(matrices[number]) if number else list(matrices[number].items()))
        tensors = [text] if field == "serialized_named_tensors" else text
        return {"lora_name": "memory", "config_dict": configs[number], field: tensors} | changes

    for number, folder in enumerate(folders):
        assert server.post(path, {"lora_name": "folder", "lora_path": str(folder)})[0] == 200
        expected = said(server, "folder")
        assert server.post(unload, {"lora_name": "folder"})[0] == 200
        status, answer = server.post(load, body(number, load_format="flattened_bucket"))
        assert (status, answer["loaded_adapters"]["memory"]) == (200, "__tensor__")
        assert said(server, "memory") == expected
    before = said(server, "memory")
    broken = {name: tensor * torch.inf for name, tensor in matrices[0].items()}
    for changes, words in (
        ({field: ["?"] if field == "serialized_named_tensors" else "?"}, "no base64"),
        ({field: None}, "serialized_named_tensors"),
        ({"config_dict": {}}, "no usable r and lora_alpha"),
        ({"config_dict": configs[0] | {"use_dora": True}}, "use_dora"),
        ({field: [shared(broken)] if field == "serialized_named_tensors" else shared(broken)}, "not finite"),
        ({"added_tokens_config": {"more": 1}}, "added_tokens_config"),
    ):
        status, answer = server.post(load, body(0, **changes))
        assert (status, answer["success"]) == (400, False) and words in answer["error_message"]
    assert said(server, "memory") == before, "the one before goes on"
    assert server.post(unload, {"lora_name": "memory"})[0] == 200


def service_with(model: Path, *modules: str) -> Any:
    engine = EngineConfig(model=str(model), kv_cache_memory="32MiB")
    config = ServerConfig(lora_modules=modules, served_model_name=("base",))
    return make_service(config, engine, TrafficConfig(), EvolutionConfig(), start_in_thread)


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (("sql",), "write NAME=FOLDER"),
        (("=folder",), "write NAME=FOLDER"),
        (("sql=a", "sql=b"), "a name of its own"),
        (("base=a",), "a name of its own"),
        (("sql=nowhere",), "name the folder of a LoRA as PEFT writes it"),
        (tuple(f"{number}=a" for number in range(33)), "33 LoRAs are more than --max-loras 32"),
    ],
)
def test_options_that_cannot_be_used(tiny_model: Path, modules: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as found:
        service_with(tiny_model, *modules)
    assert str(found.value).startswith("--lora-modules")


async def test_a_lora_of_another_model_keeps_the_server_from_starting(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_lora(tmp_path / "lora")
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "lora" / "adapter_model.safetensors")
    service = service_with(tiny_model, f"sql={tmp_path / 'lora'}")
    try:
        with pytest.raises(ConfigError, match=r"--lora-modules sql=.* mend it or leave it out"):
            await service.load()
    finally:
        await service.close()
