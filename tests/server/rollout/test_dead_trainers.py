"""Trainers that end in the middle of an update, or are started again, and those that a later one has replaced."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.client import HTTPConnection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from safetensors.torch import save, save_file
from torch import Tensor

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.target.senders import processes
from slipstream.server.rollout import sources
from slipstream.server.rollout.control import Control
from tests.forking import Forks
from tests.ports import free_port
from tests.server.sglang.calls import shared

Part = dict[str, Tensor]
BROADCASTER = (Path(__file__).parents[1] / "sglang/trainer.py").read_text()
SHARER = f"""
import sys
sys.path.append({str(Path(__file__).parents[3])!r})
from safetensors.torch import load_file
from tests.server.sglang.calls import shared
tensors = load_file(sys.argv[1])
kept = []
for line in sys.stdin:
    kept += [(name, tensors[name]) for name in line.split()]
    print(shared(kept[-len(line.split()):]), flush=True)
"""
"""A trainer that shares tensors: each line of its input names some."""


@pytest.fixture(scope="module")
def weights(tiny_model: Path) -> Callable[[int], Part]:
    config = open_checkpoint(tiny_model).config

    def different(seed: int) -> Part:
        """Norms are ones in each of them."""
        return {name: tensor + seed if "norm" in name else tensor for name, tensor in dummy_tensors(config, seed)}

    return different


@pytest.fixture(scope="module")
def file(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("policy") / "model.safetensors"
    save_file(weights(1), path)
    return path


@pytest.fixture(scope="module")
def server(start_local: Callable[..., Any]) -> Any:
    return start_local()


@pytest.fixture
def control(server: Any, weights: Any) -> Iterator[Control]:
    control: Control = server.service.control
    server.run(control.send(sources.from_bytes(save(weights(0))), finish="yes"))
    server.run(control.snapshot_weights())
    yield control
    server.run(control.cancel_update())
    server.run(control.resume())


def post(server: Any, path: str, body: Any = None, status: int = 200) -> Any:
    found, answer = server.post(path, body or {})
    assert found == status, answer
    return answer


class Trainer:
    """A process, and what it says."""

    def __init__(self, forks: Forks, code: str, *arguments: Any) -> None:
        self._process = forks.start(code, *map(str, arguments))

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.hear()

    def tell(self, line: str) -> None:
        print(line, file=self._process.stdin, flush=True)

    def hear(self) -> str:
        return self._process.stdout.readline().strip() or self._process.stderr.read()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(300)

    def end(self) -> None:
        self._process.kill()
        with self._process:  # closes what it was told and said
            pass


class Sharing:
    """Sends buckets by handles of shared tensors."""

    def __init__(self, server: Any, file: Path, forks: Forks) -> None:
        self._server, self.trainer = server, Trainer(forks, SHARER, file)

    def send(self, names: list[str], status: int = 200) -> None:
        body = {"serialized_named_tensors": [self.trainer.ask(" ".join(names))], "flush_cache": False}
        post(self._server, "/update_weights_from_tensor", body, status)


class Broadcasting:
    """Sends buckets over a group."""

    def __init__(self, server: Any, file: Path, forks: Forks) -> None:
        port, self._server, self._file = free_port(), server, file
        self.trainer = Trainer(forks, BROADCASTER, port, "weights", file)
        told = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
        post(server, "/init_weights_update_group", told | {"group_name": "weights", "backend": "gloo"})
        assert self.trainer.hear() == "joined"

    def send(self, names: list[str], status: int = 200) -> None:
        from safetensors.torch import load_file

        found = load_file(self._file)
        body = {"names": names, "group_name": "weights", "shapes": [list(found[name].shape) for name in names]}
        body["dtypes"] = [str(found[name].dtype) for name in names]
        self.trainer.tell(json.dumps(names))
        post(self._server, "/update_weights_from_distributed", body, status)
        assert self.trainer.hear() == "sent"


Sending = Callable[[type[Sharing | Broadcasting], Path], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def sending(server: Any) -> Iterator[Sending]:
    forks = Forks("safetensors.torch", "torch.distributed.distributed_c10d", "torch.multiprocessing.reductions")

    @contextmanager
    def start(kind: type[Sharing | Broadcasting], file: Path) -> Iterator[Any]:
        sender = kind(server, file, forks)
        try:
            yield sender
        finally:
            sender.trainer.end()

    yield start
    forks.close()


KINDS = [Sharing, Broadcasting]
IMPLICIT = ["/continue_generation", "/flush_cache", "/areal_continue_generation", "/reset_prefix_cache/"]
"""Calls by which a trainer ends an update without saying so."""


@pytest.mark.parametrize("end", IMPLICIT)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_serves_of_a_trainer_that_was_killed_between_buckets(
    server: Any, control: Control, file: Path, sending: Sending, kind: Any, end: str
) -> None:
    with sending(kind, file) as sender:
        post(server, "/pause_generation")
        sender.send(list(control_names(control, server))[:3])
        assert control.updating is not None
        sender.trainer.kill()
        found, answer = server.request("POST", end, b"{}", {"content-type": "application/json"})[::2]
        assert found == 200
        if end == "/continue_generation":
            assert "given up" in json.loads(answer)["message"]
    assert control.updating is None and server.run(control.differing_weights()) == []


def test_a_process_that_has_ended_is_gone_also_where_nobody_has_looked_after_it() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        [sender] = processes(f"/torch_{process.pid}_1".encode())
        assert sender.is_there().result() is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert sender.is_there().result() is False


def control_names(control: Control, server: Any) -> dict[str, str]:
    return dict(server.run(control.checksums()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_is_there_may_send_a_few_tensors(
    server: Any, control: Control, file: Path, sending: Sending, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.engine.target.senders.ANSWER_S", 300.0)
    names = list(control_names(control, server))[:3]
    with sending(kind, file) as sender:
        for name in names[:2]:
            sender.send([name])
        sender.send(names[2:])
        post(server, "/update_weights_from_tensor", {"serialized_named_tensors": [shared([])]})  # tells of nobody
        assert server.run(control.differing_weights()) == []
        post(server, "/continue_generation")
        assert server.run(control.differing_weights()) == sorted(names)


@pytest.mark.parametrize("order", [1, -1])
def test_a_trainer_that_was_started_again_begins_anew(
    server: Any, control: Control, weights: Any, file: Path, sending: Sending, tmp_path: Path, order: int
) -> None:
    """It calls nothing but what brings buckets, the same or others than before."""
    names = list(weights(1))
    other = tmp_path / "model.safetensors"
    save_file(weights(2), other)
    with sending(Sharing, file) as first, sending(Sharing, other) as second:
        first.send(names[:4])
        first.trainer.kill()
        for part in (names[:3], names[3:])[::order]:
            assert server.run(control.differing_weights()) == []
            second.send(part)
    assert control.updating is None
    found = server.run(control.checksums())
    server.run(control.send(sources.from_bytes(save(weights(2))), finish="yes"))
    assert server.run(control.checksums()) == found, "no tensor is of the first"


def test_two_trainers_that_send_the_same_tensors_make_no_mix(
    server: Any, control: Control, weights: Any, file: Path, sending: Sending
) -> None:
    names = list(weights(1))
    with sending(Sharing, file) as one, sending(Sharing, file) as other:
        one.send(names[:4])
        other.send(names[3:], status=400)
        one.send(names[4:])
        post(server, "/continue_generation", status=409)
    assert server.run(control.differing_weights()) == []


def send_segment(call: Callable[..., Any], part: Part, status: int = 200) -> Any:
    data = save(part)
    segment = SharedMemory(create=True, size=len(data))
    try:
        segment.buf[: len(data)] = data
        return call("/update_weights", {"update_info": {"shared_memory": segment.name, "num_bytes": len(data)}}, status)
    finally:
        segment.close()
        segment.unlink()


def test_whose_sender_cannot_be_seen_serves_when_it_is_whole_or_said_to_end(
    server: Any, control: Control, weights: Any
) -> None:
    found = weights(1)
    names = list(found)
    part = {name: found[name] for name in names[:3]}

    def call(path: str, body: Any, status: int) -> Any:
        return post(server, path, body, status)

    send_segment(call, part)
    error = post(server, "/areal_continue_generation", status=409)["error"]
    assert error["code"] == "update_failed" and "/start_weight_update" in error["message"]
    assert server.run(control.differing_weights()) == []
    post(server, "/areal_continue_generation")
    post(server, "/start_weight_update")
    send_segment(call, part)
    post(server, "/finish_weight_update")
    assert server.run(control.differing_weights()) == sorted(part)


def test_an_update_that_ended_with_its_engine_is_told_once(start_local: Callable[..., Any], weights: Any) -> None:
    server = start_local()
    bucket = {"serialized_named_tensors": [shared(list(weights(1).items())[:2])]}
    post(server, "/update_weights_from_tensor", bucket)

    async def die() -> None:
        server.service.kill_engine()
        await server.service.engine.ended.wait()

    server.run(die())
    server.wait_until_ready()
    error = post(server, "/continue_generation", status=409)["error"]
    assert error["code"] == "update_failed" and "old weights" in error["message"]
    post(server, "/continue_generation")
    post(server, "/update_weights_from_tensor", bucket)
    post(server, "/continue_generation")


# Turns ---------------------------------------------------------------------------------------------------------------


class Session:
    """A client that keeps cookies."""

    def __init__(self, server: Any) -> None:
        self._address, self._cookie = urlsplit(server.url).netloc, ""

    def __call__(self, path: str, body: Any = None, status: int = 200) -> Any:
        connection = HTTPConnection(self._address, timeout=300)
        headers = {"content-type": "application/json"} | ({"cookie": self._cookie} if self._cookie else {})
        connection.request("POST", path, json.dumps(body or {}), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == status, answer
        if (cookie := response.getheader("set-cookie")) is not None:
            self._cookie = cookie.partition(";")[0]
        connection.close()
        return answer


def call(method: str, **arguments: Any) -> tuple[str, Any]:
    return "/collective_rpc", {"method": method, "kwargs": arguments}


WAYS: dict[str, tuple[tuple[str, Any], tuple[str, Any], tuple[str, Any]]] = {
    "vllm": (("/start_weight_update", {}), ("/update_weights", {"update_info": {}}), ("/finish_weight_update", {})),
    "skyrl": (call("skyrl_start_weight_update"), call("update_weights_ipc"), call("skyrl_finish_weight_update")),
    "sglang": (
        ("/begin_weight_update", {}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": [""]}),
        ("/end_weight_update", {}),
    ),
    "admin": (
        ("/admin/v1/target/begin", {"version": 7}),
        ("/admin/v1/target/read", {"version": 7, "path": "/nowhere"}),
        ("/admin/v1/target/finish", {"version": 7}),
    ),
}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_trainer_that_has_lost_its_turn_is_refused(server: Any, control: Control, weights: Any, way: str) -> None:
    begin, send, end = WAYS[way]
    old, new = Session(server), Session(server)
    old(*begin)
    new(*begin)
    if way == "sglang":
        new("/update_weights_from_tensor", {"serialized_named_tensors": [shared(list(weights(1).items())[:2])]})
    for call in (send, end, begin):
        error = old(*call, status=409)["error"]
        assert error["code"] == "superseded" and "another trainer" in error["message"]
    assert control.updating is not None, "the other one's goes on"
    new(*begin)
    server.run(control.cancel_update())
    old(*begin)  # nothing is in its way now
    new(*send, status=409)


def test_a_turn_lasts_for_a_whole_update(server: Any, control: Control, weights: Any) -> None:
    found, old, new = weights(1), Session(server), Session(server)
    names = list(found)
    old("/start_weight_update")
    send_segment(old, {name: found[name] for name in names[:3]})
    new("/init_weight_transfer_engine", {"init_info": {}})
    new("/start_weight_update")
    send_segment(old, {name: found[name] for name in names[3:]}, status=409)
    for part in (names[:4], names[4:]):
        send_segment(new, {name: found[name] for name in part})
        for leave in ("/shutdown_weight_transfer_engine", "/close_communicator/", "/destroy_weights_update_group"):
            old(leave, status=409)  # what it would leave is not its own any more
        for go_on in IMPLICIT:
            old(go_on, status=409)
    old("/finish_weight_update", status=409)
    new("/finish_weight_update", {"weight_version": "whole"})
    assert control.weight_version == "whole"
    assert server.run(control.differing_weights()) == sorted(found)
