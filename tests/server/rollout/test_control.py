"""The control of a server by a trainer, over a real engine: versions of tokens, answers that are cut short."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save, save_file

from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.operations import PauseMode
from slipstream.server.errors import ConflictError, InvalidRequestError
from slipstream.server.generation import Generation, OutputOptions, Sequence, WeightSpan
from slipstream.server.rollout import sources
from slipstream.server.rollout.control import Control
from tests.server.under_way import SHORT, generated, slow_steps, wait_for_tokens

LONG = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "logprobs": 2, "temperature": 0}
LONG |= {"speculation": {"mode": "off"}}


@pytest.fixture(scope="module")
def whole(serving: Any, tiny_model: Path) -> Any:
    """What the long request gets if nobody disturbs it."""
    serving.run(serving.service.control.update_from_disk(str(tiny_model), "files"))
    return serving.complete(**LONG)["choices"][0]


# Answers that are cut short ------------------------------------------------------------------------------------------

Way = Callable[[Any, Any], None]


def by_id(server: Any, policy: Any) -> None:
    server.wait_until(lambda: "rollout-1" in server.service.control.open_requests)
    assert server.run(server.service.control.abort(["rollout-1", "unknown"])) >= 1


def by_the_answers_id(server: Any, policy: Any) -> None:
    names = server.wait_until(lambda: [n for n in server.service.control.open_requests if n.startswith("cmpl-")])
    assert server.run(server.service.control.abort(names)) >= 1


def all_of_them(server: Any, policy: Any) -> None:
    assert server.run(server.service.control.abort()) >= 1


def a_pause(server: Any, policy: Any) -> None:
    server.run(server.service.control.pause("abort"))


def an_update(server: Any, policy: Any) -> None:
    server.run(server.service.control.send(sources.from_bytes(save(policy(1))), "other", "abort"))


def sleep(server: Any, policy: Any) -> None:
    server.run(server.service.control.release_memory())


WAYS: list[Way] = [by_id, by_the_answers_id, all_of_them, a_pause, an_update, sleep]


def check_cut(found: Any, whole: Any, text: str) -> None:
    """All of it is the beginning of the whole answer: tokens, their log-probabilities, and the text."""
    logprobs = found["logprobs"]
    count = len(logprobs["tokens"])
    assert found["finish_reason"] == "abort" and count > 0
    assert text and whole["text"].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert logprobs[name] == whole["logprobs"][name][:count], name


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_aborted_answer_has_all_its_tokens(server: Any, policy: Any, whole: Any, way: Way, stream: bool) -> None:
    def ask() -> tuple[int, bytes]:
        body = json.dumps({**LONG, "n": 2, "stream": stream}).encode()
        headers = {"content-type": "application/json", "x-request-id": "rollout-1"}
        status, _, reply = server.request("POST", "/v1/completions", body, headers)
        return status, reply

    before = generated(server)
    with ThreadPoolExecutor(1) as pool:
        with slow_steps():
            asked = pool.submit(ask)
            wait_for_tokens(server, before, 24)
            way(server, policy)
        status, reply = asked.result(300)
    assert status == 200, reply
    if not stream:
        choices = json.loads(reply)["choices"]
        for choice in choices:
            check_cut(choice, whole, choice["text"])
        return
    events = [json.loads(event.removeprefix("data: ")) for event in reply.decode().split("\n\n")[:-2]]
    for index in range(2):
        parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        names = ("tokens", "token_logprobs", "text_offset")
        joined = {name: [each for part in parts for each in (part["logprobs"] or {}).get(name, [])] for name in names}
        text = "".join(part["text"] for part in parts)
        check_cut({"finish_reason": parts[-1]["finish_reason"], "logprobs": joined}, whole, text)
    server.wait_until(lambda: not server.service.control.open_requests)  # the client has its end a moment earlier


def test_nothing_that_nobody_asked_for_is_aborted(server: Any, control: Control) -> None:
    with ThreadPoolExecutor(1) as pool:
        with slow_steps():
            asked = pool.submit(server.complete, **SHORT)
            server.wait_until(lambda: control.open_requests)
            assert server.run(control.abort(["other"])) == 0
        assert asked.result(300)["choices"][0]["finish_reason"] == "length"


# Versions ------------------------------------------------------------------------------------------------------------


async def generate(
    server: Any, prompt: list[int], tokens: int, at: int, interrupt: Callable[[], Any], whole: bool = False
) -> Sequence:
    """A sequence, whose answer is interrupted once it has so many tokens; ``whole``: it is read as one piece."""
    service = server.service
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    request = NewRequest(request_id=service.engine.next_request_id(), prompt=prompt, params=params)
    sequence = Sequence(0, request, OutputOptions(), service)
    with Generation(service, "test", time.monotonic(), [sequence], 1) as generation:
        reading = asyncio.create_task(generation.collect()) if whole else None

        async def more() -> None:
            await (generation.next() if reading is None else asyncio.sleep(0.001))

        with slow_steps():
            while sequence._num_arrived < at:
                await more()
            await interrupt()
        while not generation.finished:
            await more()
    return sequence


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_an_update_in_a_pause_makes_two_spans(server: Any, control: Control, policy: Any, mode: PauseMode) -> None:
    async def interrupt() -> None:
        await control.pause(mode)
        await asyncio.sleep(0.05)
        await control.send(sources.from_bytes(save(policy(1))), "v9")
        assert control.weight_version == "v9"
        await control.resume()

    before = control.weight_version
    sequence = server.run(generate(server, [1, 2, 3], 400, 20, interrupt))
    first, second = sequence.weight_spans
    assert first == WeightSpan(0, before) and second.version == "v9" and 20 <= second.first < 400
    assert sequence.weight_version == "v9" and sequence.num_tokens == 400


@pytest.mark.parametrize("whole", [False, True])
def test_a_token_has_the_version_that_it_was_sampled_under(server: Any, control: Control, whole: bool) -> None:
    """Also in answers that are put together at their end."""
    before = control.weight_version

    async def rename() -> None:
        control.set_weight_version(before)  # as they are called
        control.set_weight_version("renamed")

    sequence = server.run(generate(server, [1, 2, 3], 400, 10, rename, whole))
    control.set_weight_version(before)
    first, second = sequence.weight_spans
    assert (first, second.version) == (WeightSpan(0, before), "renamed") and 10 <= second.first < 400


def test_a_name_for_weights_that_had_only_a_number_is_that_of_all_their_tokens(
    server: Any, control: Control, policy: Any
) -> None:
    async def name() -> None:
        control.set_weight_version("named")

    server.run(control.send(sources.from_bytes(save(policy(1)))))
    assert control.weight_version == str(server.service.engine.stats.target_version)
    assert server.run(generate(server, [1, 2, 3], 100, 10, name)).weight_spans == [WeightSpan(0, "named")]


def test_versions_are_what_trainers_call_them_and_may_come_again(server: Any, control: Control, policy: Any) -> None:
    numbers, fingerprints = [], []
    for name in ("7", "3", "step-4", "7", None):
        sent = server.run(control.send(sources.from_bytes(save(policy(2))), name))
        assert sent.missing == 0 and sent.finished is not None
        numbers.append(server.service.engine.stats.target_version)
        assert control.weight_version == (name or str(numbers[-1]))
        answer = server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1})[1]
        fingerprints.append(answer["system_fingerprint"])
    assert fingerprints[0] == fingerprints[3] and len(set(fingerprints)) == 4
    assert numbers == sorted(set(numbers)), "no number stands for two sets of weights"


def test_the_files_keep_their_name_after_many_updates(
    server: Any, control: Control, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipstream.server.rollout.versions.MOST_NAMES", 2)
    files = control.called(0).name
    for name in "abc":
        server.run(control.send(sources.from_bytes(save(policy(1))), name))
    server.run(control.release_memory(keep_weights=False))
    server.run(control.resume_memory())
    assert control.weight_version == files != "0"


# Updates -------------------------------------------------------------------------------------------------------------


def test_an_update_is_finished_when_it_is_complete_or_when_somebody_says_so(
    server: Any, control: Control, policy: Any
) -> None:
    tensors = list(policy(1).items())
    half = len(tensors) // 2
    first, second = save(dict(tensors[:half])), save(dict(tensors[half:]))
    before, started = server.run(control.checksums()), control.weight_version
    sent = server.run(control.send(sources.from_bytes(first), "a"))
    assert sent.missing == len(tensors) - half and sent.finished is None and control.updating == "a"
    assert server.run(control.checksums()) == before and control.weight_version == started
    sent = server.run(control.send(sources.from_bytes(second)))
    assert sent.finished is not None and control.updating is None and control.weight_version == "a"
    server.run(control.snapshot_weights())
    server.run(control.send(sources.from_bytes(save(dict([tensors[0]]))), "b", finish="no"))
    server.run(control.finish_update("b", keep_rest=True))
    assert server.run(control.differing_weights()) == []
    name = tensors[0][0]
    server.run(control.send(sources.from_bytes(save({name: tensors[0][1] + 1})), "c", finish="no"))
    assert control.weight_version == "b"
    server.run(control.finish_update("c", keep_rest=True, name="d"))
    assert control.weight_version == "d" and server.run(control.differing_weights()) == [name]


@pytest.mark.parametrize("way", ["with a later bucket", "apart"])
def test_an_update_may_be_named_late(server: Any, control: Control, policy: Any, way: str) -> None:
    tensors = list(policy(1).items())
    server.run(control.send(sources.from_bytes(save(policy(1))), "first"))
    server.run(control.snapshot_weights())
    server.run(control.send(sources.from_bytes(save(policy(2))), "second"))
    sent = server.run(control.send(sources.from_bytes(save(dict(tensors[:3])))))
    assert sent.finished is None
    if way == "apart":
        control.set_weight_version("late")
    name = None if way == "apart" else "late"
    sent = server.run(control.send(sources.from_bytes(save(dict(tensors[3:]))), name))
    assert sent.finished is not None and control.weight_version == "late" and control.updating is None
    assert server.run(control.differing_weights()) == [], "nothing that had come before is lost"
    server.run(control.send(sources.from_bytes(save(dict(tensors[:3]))), "one"))
    server.run(control.send(sources.from_bytes(save(dict(tensors[3:]))), "another"))
    assert control.updating == "another" and control.weight_version == "late"
    server.run(control.cancel_update())


def test_files_are_an_update_by_themselves(server: Any, control: Control, policy: Any, tmp_path: Path) -> None:
    names = list(policy(1))
    save_file({name: policy(1)[name] for name in names[3:]}, tmp_path / "some.safetensors")
    server.run(control.send(sources.from_bytes(save({name: policy(1)[name] for name in names[:3]}))))
    with pytest.raises(InvalidRequestError, match="lacks"):
        server.run(control.update_from_disk(str(tmp_path / "some.safetensors"), "files alone"))
    assert control.updating is None and control.weight_version != "files alone"


def test_tensors_that_come_at_the_same_time_are_of_one_update(server: Any, control: Control, policy: Any) -> None:
    parts = [save({name: tensor}) for name, tensor in policy(1).items()]

    async def send() -> list[Any]:
        return await asyncio.gather(*(control.send(sources.from_bytes(part), "together") for part in parts))

    sent = server.run(send())
    assert [each.finished is not None for each in sent].count(True) == 1 and control.weight_version == "together"
    server.run(control.snapshot_weights())
    server.run(control.send(sources.from_bytes(save(policy(1))), "whole"))
    assert server.run(control.differing_weights()) == []


def test_an_update_that_fails_is_given_up(server: Any, control: Control, policy: Any) -> None:
    before = control.weight_version
    for send in (
        lambda: control.send(sources.from_bytes(b"nothing"), "x"),
        lambda: control.send(sources.from_bytes(save(dict(list(policy(1).items())[:2]))), "x", finish="yes"),
        lambda: control.update_from_disk("/nowhere/at/all", "x"),
        lambda: control.send(sources.from_shared_memory("no-such-segment", 10), "x"),
        lambda: control.send_handles(b"", (), "x"),
        lambda: control.send(sources.from_group("nobody", [("a", "float32", [1])]), "x"),
    ):
        with pytest.raises(InvalidRequestError):
            server.run(send())
        assert control.updating is None and control.weight_version == before
    with pytest.raises(InvalidRequestError, match="but none"):
        server.run(control.finish_update("x"))
    server.run(control.cancel_update())
    with pytest.raises(ConflictError, match="no snapshot"):
        server.run(Control(server.service).differing_weights())


def test_weights_come_through_shared_memory(server: Any, control: Control, policy: Any) -> None:
    data = save(policy(3))
    segment = SharedMemory(create=True, size=len(data))
    try:
        segment.buf[: len(data)] = data
        sent = server.run(control.send(sources.from_shared_memory(segment.name, len(data)), "shared"))
    finally:
        segment.close()
        segment.unlink()
    assert sent.finished is not None and control.weight_version == "shared"
    norm = server.run(control.read_tensor("model.norm.weight", 0, 100))
    assert norm.shape == (64,)
