"""logprob_token_ids: a request chooses which tokens it is told of, in place of the likeliest."""

from __future__ import annotations

from typing import Any

import pytest

PROMPT = [504, 2365, 6354, 16438]
AS_IDS = {"return_tokens_as_token_ids": True, "max_tokens": 1}
MESSAGES = [{"role": "user", "content": "Hello"}]


def named(found: dict[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): logprob for name, logprob in found.items()}


@pytest.fixture
def likely(server: Any) -> dict[int, float]:
    """The likeliest tokens after the prompt, best first."""
    [choice] = server.complete(PROMPT, logprobs=20, **AS_IDS)["choices"]
    [found] = choice["logprobs"]["top_logprobs"]
    return named(found)


def test_they_take_the_place_of_the_likeliest(server: Any, likely: dict[int, float]) -> None:
    best, *others = likely
    chosen = [others[7], others[2], others[7]]
    asked = AS_IDS | {"logprobs": 5, "logprob_token_ids": chosen}
    [choice] = server.complete(PROMPT, **asked)["choices"]
    expected = {token: likely[token] for token in (best, *chosen)}
    assert named(choice["logprobs"]["top_logprobs"][0]) == pytest.approx(expected, abs=1e-6)
    first = server.events("/v1/completions", {"prompt": PROMPT, **asked})[0]["choices"][0]
    assert first["logprobs"] == choice["logprobs"]
    [choice] = server.complete(PROMPT, **asked | {"allowed_token_ids": [others[4]]})["choices"]
    assert named(choice["logprobs"]["top_logprobs"][0]).keys() == {others[4], *chosen}
    [choice] = server.complete(PROMPT, **asked, echo=True)["choices"]
    first, *following = choice["logprobs"]["top_logprobs"]
    assert first is None and all(set(chosen) < named(found).keys() for found in following)


@pytest.mark.parametrize("top", [None, 0, 2])
def test_in_chats(server: Any, top: int | None) -> None:
    asked = AS_IDS | {"logprobs": True, "top_logprobs": top, "logprob_token_ids": [17, 5000], "messages": MESSAGES}
    status, whole = server.post("/v1/chat/completions", asked | {"temperature": 0})
    assert status == 200, whole
    [position] = whole["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in position["top_logprobs"]] == [position["token"], "token_id:17", "token_id:5000"]
    events = server.events("/v1/chat/completions", asked)
    told = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
    assert told == [whole["choices"][0]["logprobs"]]


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_token_ids_in_token_ids_out(server: Any, likely: dict[int, float], mode: str) -> None:
    """There nothing else has to be asked for, as what vLLM's server renders does not either."""
    best, *others = likely
    wanted = {"temperature": 0, "max_tokens": 1, "logprob_token_ids": [others[3]]}
    body = {"token_ids": PROMPT, "sampling_params": wanted, "output_mode": mode}
    status, reply = server.post("/inference/v1/generate", body)
    assert status == 200, reply
    [position] = reply["choices"][0]["logprobs"]["content"]
    expected = pytest.approx([likely[best], likely[others[3]]], abs=1e-6)
    assert [one["logprob"] for one in position["top_logprobs"]] == expected
    if mode == "tokens":
        told = [(one["token_id"], one["rank"]) for one in position["top_logprobs"]]
        assert told == [(best, 1), (others[3], None)]


def test_what_makes_no_sense_is_refused(server: Any) -> None:
    tokens = {"logprob_token_ids": [5]}
    bodies: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"prompt": "x", **tokens}, "logprob_token_ids needs logprobs"),
        ("/v1/chat/completions", {"messages": MESSAGES, **tokens}, "logprob_token_ids needs logprobs: true"),
        ("/v1/completions", {"prompt": "x", "logprobs": 0, "logprob_token_ids": [60_000]}, "60000"),
        ("/v1/completions", {"prompt": "x", "logprobs": 0, "logprob_token_ids": [*range(21)]}, "at most 20"),
        ("/generate/", {"prompts": ["x"], "generation_kwargs": tokens}, "use /inference/v1/generate"),
    ]
    for path, body, expected in bodies:
        status, reply = server.post(path, body)
        assert status == 400 and expected in reply["error"]["message"], reply
        assert reply["error"]["param"] == "logprob_token_ids"
