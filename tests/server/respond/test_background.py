"""Responses in the background, and those that others end: through the OpenAI client unchanged."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.server.respond.asked import QUESTION, ask
from tests.server.under_way import slow_steps


def test_in_the_background(server: Any) -> None:
    found = ask(server, background=True)
    assert found["status"] == "in_progress" and found["background"] is True

    def ended() -> Any:
        _, now = server.get(f"/v1/responses/{found['id']}")
        return now if now["status"] != "in_progress" else None

    assert server.wait_until(ended)["output"] == [{**ask(server)["output"][0], "id": ended()["output"][0]["id"]}]
    with slow_steps():
        endless = ask(server, background=True, max_output_tokens=server.long, chat_template_kwargs={})
        status, cancelled = server.post(f"/v1/responses/{endless['id']}/cancel", {})
    assert status == 200 and cancelled["status"] == "cancelled"
    assert server.post(f"/v1/responses/{endless['id']}/cancel", {})[1] == cancelled
    server.wait_until_idle()


def test_a_stream_in_the_background_is_followed_again(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "max_output_tokens": 200, "background": True}
    with slow_steps():
        with client.responses.create(**asked, stream=True) as stream:
            seen: list[Any] = [next(stream) for _ in range(8)]
        name = seen[0].response.id
        assert seen[0].response.background and client.responses.retrieve(name).status == "in_progress"
    rest: Any = list(client.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number))
    every: Any = list(client.responses.retrieve(name, stream=True))
    assert [each.sequence_number for each in every] == list(range(len(every)))
    assert [each.to_dict() for each in every] == [each.to_dict() for each in seen + rest]
    whole = client.responses.retrieve(name)
    assert every[-1].response == whole and whole.output_text
    assert "".join(each.delta for each in every if each.type == "response.output_text.delta") == whole.output_text
    assert list(client.responses.retrieve(name, stream=True, starting_after=len(every))) == []
    server.wait_until_idle()


def test_all_who_follow_hear_of_its_end(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "max_output_tokens": server.long, "background": True}
    with slow_steps(), client.responses.create(**asked, stream=True) as stream:
        name = next(iter(stream)).response.id  # type: ignore[union-attr]
        with client.responses.retrieve(name, stream=True) as other, ThreadPoolExecutor(2) as pool:
            ends = [pool.submit(lambda each: [*each][-1], each) for each in (stream, other)]
            assert client.responses.cancel(name).status == "cancelled"
            assert {each.result(60).response.status for each in ends} == {"cancelled"}  # type: ignore[union-attr]
    client.responses.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(name, stream=True)
    server.wait_until_idle()


def test_what_takes_too_long_in_the_background_fails(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "max_output_tokens": server.long, "background": True}
    with slow_steps():
        short: Any = client.responses.create(**asked, stream=True, extra_headers={"x-slipstream-timeout-s": "0.5"})
        last = [*short][-1]
    assert last.type == "response.failed" and "longer" in last.response.error.message
    assert client.responses.retrieve(last.response.id).status == "failed"
    server.wait_until_idle()


def test_only_streams_in_the_background_can_be_followed(server: Any) -> None:
    name = ask(server)["id"]
    for query, param in (("stream=true", "stream"), ("stream=true&starting_after=x", "starting_after")):
        status, found = server.get(f"/v1/responses/{name}?{query}")
        assert (status, found["error"]["param"]) == (400, param)
    assert server.get(f"/v1/responses/{name}?stream=false")[0] == 200


def test_a_stream_is_cancelled_from_elsewhere(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "max_output_tokens": server.long}
    with slow_steps(), client.responses.create(**asked, stream=True) as stream:
        first: Any = next(iter(stream))
        thread = threading.Thread(target=lambda: client.responses.cancel(first.response.id))
        thread.start()
        *_, last = stream
        thread.join()
    assert last.type == "response.incomplete" and last.response.status == "cancelled"  # type: ignore[comparison-overlap]
    server.wait_until_idle()


def test_who_goes_away_leaves_nothing(server: Any, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny-model", "input": QUESTION, "max_output_tokens": server.long}
    with slow_steps(), client.responses.create(**asked, stream=True) as stream:
        first: Any = next(iter(stream))
        assert client.responses.retrieve(first.response.id).status == "in_progress"
    server.wait_until_idle()
    server.wait_until(lambda: server.get(f"/v1/responses/{first.response.id}")[0] == 404)
