"""What the fields of a request do to the answer of the real model."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

COUNTING = "1, 2, 3, 4,"

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_stop_string_trims_text_tokens_logprobs_and_usage_alike(default_server: Any) -> None:
    free = default_server.complete(COUNTING, max_tokens=30, return_token_ids=True, logprobs=0)
    reply = default_server.complete(COUNTING, max_tokens=30, stop=["7,"], return_token_ids=True, logprobs=0)
    choice = reply["choices"][0]
    assert choice["text"] == " 5, 6, "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "7,"
    assert default_server.post("/detokenize", {"tokens": choice["token_ids"]})[1]["prompt"] == " 5, 6, 7,"
    assert choice["token_ids"] == free["choices"][0]["token_ids"][: len(choice["token_ids"])]
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
    assert reply["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_stop_string_ends_the_work_of_the_engine(default_server: Any) -> None:
    default_server.complete(COUNTING, max_tokens=4000, stop="7,", ignore_eos=True)
    default_server.wait_until_idle()


def test_include_stop_string(default_server: Any) -> None:
    choice = default_server.complete(COUNTING, max_tokens=30, stop="7", include_stop_str_in_output=True)["choices"][0]
    assert choice["text"] == " 5, 6, 7"


def test_stop_string_is_not_seen_before_min_tokens(default_server: Any) -> None:
    choice = default_server.complete(COUNTING, max_tokens=30, stop=",", min_tokens=8)["choices"][0]
    assert choice["text"].count(",") >= 2
    assert choice["finish_reason"] == "stop"


def test_stop_token(default_server: Any) -> None:
    [comma] = default_server.post("/tokenize", {"prompt": ","})[1]["tokens"]
    choice = default_server.complete(COUNTING, max_tokens=30, stop_token_ids=[comma], return_token_ids=True)["choices"][
        0
    ]
    assert choice["text"] == " 5"
    assert choice["stop_reason"] == comma
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"][-1] == comma
    choice = default_server.complete(COUNTING, max_tokens=30, stop_token_ids=[comma], include_stop_str_in_output=True)[
        "choices"
    ]
    assert choice[0]["text"] == " 5,"


def test_end_of_sequence_has_no_stop_reason(default_server: Any) -> None:
    choice = default_server.chat(return_token_ids=True)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    assert choice["message"]["content"] == "The capital of France is Paris."
    ended = default_server.post("/detokenize", {"tokens": choice["token_ids"]})[1]["prompt"]
    assert ended == "The capital of France is Paris.<|im_end|>"


def test_ignore_eos_and_special_tokens(default_server: Any) -> None:
    choice = default_server.chat(max_tokens=12, ignore_eos=True, skip_special_tokens=False)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("The capital of France is Paris.<|im_end|>")


def test_min_tokens(default_server: Any) -> None:
    assert default_server.chat(min_tokens=20, max_tokens=25)["usage"]["completion_tokens"] >= 20


def test_seed_gives_the_same_choices_again(default_server: Any) -> None:
    ask = {"temperature": 1, "n": 3, "seed": 11, "max_tokens": 12}
    first, second = (default_server.complete("My favourite animal is", **ask)["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) == 3
    # Choice i is what seed + i gives alone, whatever else the request asks for.
    alone = default_server.complete("My favourite animal is", temperature=1, seed=13, max_tokens=12)["choices"][0]
    assert alone["text"] == first[2]["text"]


def test_a_seed_of_minus_one_is_none(default_server: Any) -> None:
    """As llama.cpp, vLLM and what is made for them mean it: each of four answers is another one."""
    ask = {"temperature": 2, "seed": -1, "max_tokens": 24}
    assert len({default_server.complete("My", **ask)["choices"][0]["text"] for _ in range(4)}) == 4
    assert len({default_server.chat(**ask)["choices"][0]["message"]["content"] for _ in range(4)}) == 4


def test_several_prompts_with_several_choices(default_server: Any) -> None:
    choices = default_server.complete(["A, B, C,", COUNTING], n=2, max_tokens=4, return_token_ids=True)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] == choices[1]["text"] != choices[2]["text"] == choices[3]["text"]
    assert choices[0]["prompt_token_ids"] == choices[1]["prompt_token_ids"] != choices[2]["prompt_token_ids"]


def test_usage_counts_a_prompt_once(default_server: Any) -> None:
    usage = default_server.complete([COUNTING, "A, B, C,"], n=2, max_tokens=4)["usage"]
    one = default_server.post("/tokenize", {"prompt": COUNTING})[1]["count"]
    other = default_server.post("/tokenize", {"prompt": "A, B, C,"})[1]["count"]
    assert usage["prompt_tokens"] == one + other
    assert usage["completion_tokens"] == 16


def test_cached_tokens(default_server: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 12
    salted = {"max_tokens": 1, "cache_salt": "only-in-this-test"}
    first, again = (default_server.complete(text, **salted)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] >= again["prompt_tokens"] - 17
    other = default_server.complete(text, max_tokens=1, cache_salt="another")["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0


def test_logit_bias_and_allowed_tokens(default_server: Any) -> None:
    [yes] = default_server.post("/tokenize", {"prompt": " yes"})[1]["tokens"]
    [no] = default_server.post("/tokenize", {"prompt": " no"})[1]["tokens"]
    prompt = "The capital of France is"
    assert default_server.complete(prompt, max_tokens=2, logit_bias={str(yes): 100})["choices"][0]["text"] == " yes yes"
    only = default_server.complete(
        prompt, max_tokens=6, temperature=2, allowed_token_ids=[yes, no], return_token_ids=True
    )
    assert set(only["choices"][0]["token_ids"]) <= {yes, no}


def test_bad_words(default_server: Any) -> None:
    text = default_server.complete("The capital of France is", max_tokens=8, bad_words=["Paris"])["choices"][0]["text"]
    assert "Paris" not in text


def test_top_p_zero_is_greedy(default_server: Any) -> None:
    greedy = default_server.complete(COUNTING, max_tokens=8)["choices"][0]["text"]
    assert default_server.complete(COUNTING, max_tokens=8, temperature=2, top_p=0)["choices"][0]["text"] == greedy


def test_max_tokens_defaults(default_server: Any, small_server: Any) -> None:
    assert default_server.complete(COUNTING, ignore_eos=True)["usage"]["completion_tokens"] == 16
    limit = small_server.get("/v1/models")[1]["data"][0]["max_model_len"]
    usage = small_server.complete([500] * (limit - 5), ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 5  # all the room there is
    chat = default_server.chat("Hello", max_tokens=None, ignore_eos=False)
    assert chat["choices"][0]["finish_reason"] == "stop"


def test_variables_of_a_template_may_have_any_name(default_server: Any) -> None:
    """Names that this program uses itself, in any function on the way, are names like others."""
    plain = default_server.post("/tokenize", {"messages": MESSAGES})[1]
    for name in (
        "template",
        "options",
        "variables",
        "self_",
        "timeout",
        "name",
        "work",
        "context",
        "__class__",
        "",
        "%s",
    ):
        body = {"messages": MESSAGES, "chat_template_kwargs": {name: 1}}
        assert default_server.post("/tokenize", body) == (200, plain)
    for name in ("self", "messages", "tools", "raise_exception", "strftime_now", "namespace", "range", "loop"):
        status, reply = default_server.post("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {name: 1}})
        assert (status, reply["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


@pytest.mark.parametrize("content", [{"content": None}, {"content": []}, {}, {"content": None, "tool_calls": []}])
def test_an_assistant_that_said_nothing(default_server: Any, content: dict[str, Any]) -> None:
    def tokens(said: dict[str, Any]) -> Any:
        messages = [*MESSAGES, {"role": "assistant", **said}, *MESSAGES]
        status, reply = default_server.post("/tokenize", {"messages": messages})
        assert status == 200, reply
        return reply["tokens"]

    assert tokens(content) == tokens({"content": ""})


@pytest.mark.parametrize("more", [{}, {"stop": ["Paris"]}, {"stop": ["is"], "include_stop_str_in_output": True}])
def test_text_offsets_of_parts_of_characters(default_server: Any, more: dict[str, Any]) -> None:
    prompt = "🦜🎉 你好: The capital of France is"
    choice = default_server.complete(prompt, max_tokens=6, echo=True, logprobs=0, **more)["choices"][0]
    logprobs = choice["logprobs"]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
    for token, offset in zip(logprobs["tokens"], offsets, strict=True):
        if "\\x" not in token:
            assert (choice["text"] + "Paris")[offset:].startswith(token)
    events = default_server.events(
        "/v1/completions", {"prompt": prompt, "max_tokens": 6, "echo": True, "logprobs": 0, **more}
    )
    chunks = [event["choices"][0]["logprobs"] for event in events[:-1]]
    streamed = [offset for chunk in chunks if chunk for offset in chunk["text_offset"]]
    assert [min(offset, len(choice["text"])) for offset in streamed] == offsets


def test_legacy_logprobs(default_server: Any) -> None:
    choice = default_server.complete(COUNTING, max_tokens=6, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2


def test_sampled_token_is_among_the_top_logprobs(default_server: Any) -> None:
    ask = {"temperature": 2, "seed": 3, "max_tokens": 20, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = default_server.complete(COUNTING, logprobs=0, **ask)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]


def test_logprobs_mode(default_server: Any) -> None:
    ask = {"max_tokens": 4, "logprobs": 0, "temperature": 0.5, "seed": 1}
    raw = default_server.complete(COUNTING, logprobs_mode="raw", **ask)["choices"][0]["logprobs"]["token_logprobs"]
    processed = default_server.complete(COUNTING, logprobs_mode="processed", **ask)["choices"][0]["logprobs"][
        "token_logprobs"
    ]
    assert all(mild < sharp for mild, sharp in zip(raw, processed, strict=True))  # a lower temperature is sharper


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_as_evaluation_harnesses_ask(default_server: Any, max_tokens: int) -> None:
    prompt = "The capital of France is Paris."
    reply = default_server.complete(prompt, max_tokens=max_tokens, echo=True, logprobs=1)
    choice = reply["choices"][0]
    logprobs = choice["logprobs"]
    count = default_server.post("/tokenize", {"prompt": prompt})[1]["count"]
    assert choice["text"].startswith(prompt)
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert choice["finish_reason"] == "length"
    assert len(logprobs["tokens"]) == count + max_tokens == len(logprobs["top_logprobs"])
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert reply["usage"]["completion_tokens"] == max_tokens
    # " Paris" after "The capital of France is" is what greedy decoding would have said.
    paris = logprobs["tokens"].index(" Paris")
    assert logprobs["top_logprobs"][paris][" Paris"] == logprobs["token_logprobs"][paris]


def test_prompt_logprobs_agree_with_those_of_generation(default_server: Any) -> None:
    first = default_server.complete(COUNTING, max_tokens=5, logprobs=1, return_token_ids=True)["choices"][0]
    whole = first["prompt_token_ids"] + first["token_ids"]
    scored = default_server.complete(whole, max_tokens=1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    assert len(scored) == len(whole)
    generated = scored[-5:]
    for token, entry, logprob in zip(first["token_ids"], generated, first["logprobs"]["token_logprobs"], strict=True):
        assert entry[str(token)]["rank"] == 1
        assert math.isclose(entry[str(token)]["logprob"], logprob, abs_tol=0.05)  # bfloat16
        assert set(entry[str(token)]) == {"logprob", "rank", "decoded_token"}


def test_chat_prompt_logprobs_and_token_ids(default_server: Any) -> None:
    reply = default_server.chat(max_tokens=3, prompt_logprobs=0, return_token_ids=True)
    assert len(reply["prompt_logprobs"]) == len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    assert len(reply["choices"][0]["token_ids"]) == 3


def test_messages_as_parts_and_developer_role(default_server: Any) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    counts = [default_server.post("/tokenize", {"messages": messages})[1]["tokens"] for messages in (plain, parts)]
    assert counts[0] == counts[1]


def test_continue_final_message(default_server: Any) -> None:
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    status, reply = default_server.post(
        "/v1/chat/completions",
        {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 5},
    )
    assert status == 200
    assert reply["choices"][0]["message"]["content"].startswith(" Paris")


def test_tokenize_and_back(default_server: Any) -> None:
    text = "Grüße, 世界! <|im_end|>"
    status, reply = default_server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert status == 200
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == default_server.get("/v1/models")[1]["data"][0]["max_model_len"]
    assert default_server.post("/detokenize", {"tokens": reply["tokens"]}) == (200, {"prompt": text, "text": text})
    chat = default_server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})[1]
    assert chat["count"] == default_server.chat("Hi", max_tokens=1)["usage"]["prompt_tokens"]


def test_long_prompts_are_tokenized_like_short_ones(default_server: Any) -> None:
    text = "one two three four five six seven. " * 3_000  # goes to a text worker; several times the context
    reply = default_server.post("/tokenize", {"prompt": text})[1]
    assert reply["count"] == 24_001  # the last space is one of its own
    assert default_server.post("/detokenize", {"tokens": reply["tokens"]})[1]["prompt"] == text


def test_request_id(default_server: Any) -> None:
    assert default_server.chat(max_tokens=1, request_id="mine-1")["id"] == "chatcmpl-mine-1"
    body = b'{"prompt": "x", "max_tokens": 1}'
    status, headers, reply = default_server.request(
        "POST", "/v1/completions", body, {"content-type": "application/json", "x-request-id": "trace-7"}
    )
    assert status == 200
    assert headers["x-request-id"] == "trace-7"
    assert json.loads(reply)["id"] == "cmpl-trace-7"
