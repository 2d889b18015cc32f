"""Prompts that are made shorter because a request asks for that, in every dialect that has a field for it."""

from __future__ import annotations

from typing import Any

import pytest

LONG = [7 + index % 900 for index in range(9000)]


def posted(server: Any, path: str, body: dict[str, Any]) -> Any:
    status, found = server.post(path, body)
    assert status == 200, found
    return found


def refused(server: Any, path: str, body: dict[str, Any]) -> Any:
    status, found = server.post(path, body)
    assert status == 400, found
    return found["error"]


def context(server: Any) -> int:
    return posted(server, "/tokenize", {"prompt": "x"})["max_model_len"]


def complete(server: Any, prompt: Any, **fields: Any) -> Any:
    return posted(server, "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 4, **fields})


def test_the_last_tokens_of_ids_stay(server: Any) -> None:
    cut = complete(server, LONG, truncate_prompt_tokens=9, return_token_ids=True)
    whole = complete(server, LONG[-9:], return_token_ids=True)
    assert cut["usage"]["prompt_tokens"] == 9
    assert cut["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    assert complete(server, LONG[:5], truncate_prompt_tokens=9)["usage"]["prompt_tokens"] == 5
    first = complete(server, LONG, truncate_prompt_tokens=9, truncation_side="right", return_token_ids=True)
    whole = complete(server, LONG[:9], return_token_ids=True)
    assert first["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]


def test_all_that_fit_leave_room_for_the_answer(server: Any) -> None:
    found = complete(server, LONG, truncate_prompt_tokens=-1, max_tokens=8, ignore_eos=True)
    assert found["usage"]["prompt_tokens"] == context(server) - 8
    assert found["usage"]["completion_tokens"] == 8
    found = posted(
        server,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "word " * 9000}], "truncate_prompt_tokens": -1, "timeout_s": 60}
        | {"min_tokens": 20, "stop": ["e"]},
    )
    assert context(server) * 3 // 4 < found["usage"]["prompt_tokens"] < context(server)


def test_where_no_answer_follows_all_of_the_context_is_the_prompts(server: Any) -> None:
    found = complete(server, LONG, truncate_prompt_tokens=-1, max_tokens=0, prompt_logprobs=0)
    assert found["usage"]["prompt_tokens"] == context(server)


def test_an_echo_is_of_what_was_used(server: Any) -> None:
    asked = {"truncate_prompt_tokens": 3, "echo": True, "max_tokens": 1}
    [cut] = complete(server, "one two three four five six", **asked)["choices"]
    [whole] = complete(server, "one two three", **asked)["choices"]
    assert cut["text"].count(" ") < 6 and not cut["text"].startswith("one")
    assert whole["text"].startswith("one two three")


def test_every_other_dialect_has_it(server: Any) -> None:
    body = {"token_ids": LONG, "sampling_params": {"truncate_prompt_tokens": 6, "max_tokens": 2}}
    assert len(posted(server, "/inference/v1/generate", body)["choices"][0]["token_ids"]) == 2
    found = posted(server, "/v1/embeddings", {"input": ["word " * 9000, "x"], "truncate_prompt_tokens": -1})
    assert found["usage"]["prompt_tokens"] > context(server) // 2
    assert refused(server, "/v1/embeddings", {"input": LONG})["param"] == "input"


@pytest.mark.parametrize("value", [0, -2, "all"])
def test_a_number_that_leaves_nothing_is_refused(server: Any, value: Any) -> None:
    error = refused(server, "/v1/completions", {"prompt": "x", "truncate_prompt_tokens": value})
    assert error["param"] == "truncate_prompt_tokens"


def turns(count: int, words: int = 200) -> list[dict[str, Any]]:
    found = [{"role": "system", "content": "Be brief."}]
    for index in range(count):
        found += [{"role": "user", "content": f"{index} " * words}, {"role": "assistant", "content": "Yes."}]
    return [*found, {"role": "user", "content": "And now?"}]


def respond(server: Any, items: Any, **fields: Any) -> Any:
    return posted(server, "/v1/responses", {"input": items, "max_output_tokens": 16, "temperature": 0} | fields)


def test_responses_leave_out_the_first_turns(server: Any) -> None:
    items = turns(count=30)
    assert refused(server, "/v1/responses", {"input": items})["param"] == "input"
    found = respond(server, items, truncation="auto")
    limit = context(server)
    assert found["truncation"] == "auto"
    assert limit - 1000 < found["usage"]["input_tokens"] <= limit - 16
    used = found["usage"]["input_tokens"]
    begins = [at for at, item in enumerate(items) if item["role"] == "user"]
    for at in begins:
        counted = posted(server, "/v1/responses/input_tokens", {"input": [items[0], *items[at:]]})["input_tokens"]
        if counted <= used:
            break
    alone = respond(server, [items[0], *items[at:]])
    assert at > begins[0] and counted == used
    assert alone["output"][0]["content"] == found["output"][0]["content"]


def test_what_fits_stays_whole(server: Any) -> None:
    items = turns(count=2, words=3)
    auto, whole = respond(server, items, truncation="auto"), respond(server, items)
    assert auto["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_a_last_turn_that_is_too_long_is_refused(server: Any) -> None:
    items = [*turns(count=1), {"role": "user", "content": "word " * 9000}]
    error = refused(server, "/v1/responses", {"input": items, "truncation": "auto"})
    assert error["param"] == "input" and "context" in error["message"]
