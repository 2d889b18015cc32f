"""Routes and fields of vLLM's and SGLang's servers beside OpenAI's, as their own tests use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.under_way import slow_steps

MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
THINKS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>"


def post(server: Any, path: str, **body: Any) -> Any:
    status, found = server.post(path, body)
    assert status == 200, found
    return found


@pytest.mark.parametrize("version", ["", "/v1"])
def test_several_texts_are_tokenized_at_once(server: Any, version: str) -> None:
    texts = ["Rome", "", "Zürich 🎉"]
    each = [post(server, f"{version}/tokenize", prompt=text, return_token_strs=True) for text in texts]
    together = post(server, f"{version}/tokenize", prompt=texts, return_token_strs=True)
    assert together.pop("max_model_len") == 8192
    assert together == {name: [one[name] for one in each] for name in ("count", "tokens", "token_strs")}
    assert together["count"] == list(map(len, together["tokens"])) and together["count"][1] == 0
    said = post(server, f"{version}/detokenize", tokens=together["tokens"])
    assert said == {"prompt": texts, "text": texts}
    assert post(server, f"{version}/detokenize", tokens=each[0]["tokens"]) == {"prompt": "Rome", "text": "Rome"}
    assert post(server, f"{version}/detokenize", tokens=[]) == {"prompt": "", "text": ""}
    for path, body, param in (("tokenize", {"prompt": []}, "prompt"), ("detokenize", {"tokens": [[1], 2]}, "tokens")):
        status, found = server.post(f"{version}/{path}", body)
        assert status == 400 and found["error"]["param"].startswith(param)
    status, found = server.post(f"{version}/detokenize", {"tokens": [[1], [10**6]]})
    assert status == 400 and found["error"]["param"] == "tokens"


def test_special_tokens_may_be_left_out_of_a_text(server: Any) -> None:
    tokens = post(server, "/tokenize", messages=MESSAGES)["tokens"]
    whole, plain = (post(server, "/detokenize", tokens=tokens, skip_special_tokens=skip) for skip in (False, True))
    assert "<|im_start|>" in whole["text"] and "<|im_start|>" not in plain["text"]
    assert MESSAGES[0]["content"] in plain["prompt"] == plain["text"]


def test_tools_count_where_a_conversation_is_tokenized(server: Any) -> None:
    counts = [
        post(server, "/v1/tokenize", messages=MESSAGES, **tools)["count"]
        for tools in ({}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "none"})
    ]
    assert counts[0] == counts[2] < counts[1]


def test_one_route_for_everything(server: Any) -> None:
    """As SageMaker's machines have it: they know /ping and /invocations only."""
    assert server.get("/ping") == server.get("/health")
    greedy = {"temperature": 0, "max_tokens": 3}
    bodies = {
        "/v1/chat/completions": {"messages": MESSAGES, **greedy},
        "/v1/completions": {"prompt": ["Rome", "Bern"], **greedy},
        "/v1/embeddings": {"input": "Rome"},
    }
    for path, body in bodies.items():
        expected, found = post(server, path, **body), post(server, "/invocations", **body)
        assert expected.keys() == found.keys()
        name = "data" if "input" in body else "choices"
        assert expected[name] == found[name]
    told = [event["choices"][0]["text"] for event in server.events("/invocations", {"prompt": "Rome"})[:-1]]
    assert "".join(told)
    for wrong, param in ({"text": "Rome"}, "messages"), ({"prompt": 5}, "prompt"), ([], None):
        status, found = server.post("/invocations", wrong)
        assert status == 400 and found["error"]["param"] == param, found


def test_the_load_is_what_is_under_way(server: Any) -> None:
    assert server.get("/load") == (200, {"server_load": 0})
    with slow_steps(), server.open_stream(n=2, max_tokens=server.long):
        assert server.wait_until(lambda: server.get("/load")[1]["server_load"] == 2)
    server.wait_until_idle()


def test_routers_name_sessions(server: Any) -> None:
    about = {"session_id": "s-1", "routed_experts_prompt_start": 0, "max_tokens": 1}
    assert post(server, "/v1/completions", prompt="x", **about)["choices"]
    assert post(server, "/v1/chat/completions", messages=MESSAGES, **about)["choices"]
    assert post(server, "/v1/responses", input="x", session_id="s-1", max_output_tokens=1)["output"]
    assert server.get("/weight_version") == server.get("/get_weight_version")


def test_fields_have_the_names_of_sglang(server: Any) -> None:
    body = {"prompt": [504, 2365, 6354] * 20, "temperature": 0, "max_tokens": 8}
    text = post(server, "/v1/completions", **body)["choices"][0]["text"]
    stop = text[2:4]
    at = text.index(stop)
    kept, cut = (post(server, "/v1/completions", **body, stop=stop, no_stop_trim=keep) for keep in (True, False))
    assert kept["choices"][0]["text"] == text[: at + 2] and cut["choices"][0]["text"] == text[:at]
    assert post(server, "/v1/completions", **body, rid="mine")["id"] == "cmpl-mine"
    status, found = server.post("/v1/completions", body | {"lora_path": "none"})
    assert status == 404 and found["error"]["code"] == "model_not_found"

    def cached(**salts: str) -> int:
        tokens: int = post(server, "/v1/completions", **body, **salts)["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        return tokens

    assert cached(extra_key="a", cache_salt="s") == 0 < cached(extra_key="a", cache_salt="s")
    assert cached(extra_key="b", cache_salt="s") == cached(extra_key="a", cache_salt="t") == 0


def test_templates_may_know_more_roles(start_local: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "controls.jinja"
    template.write_text("""{% for m in messages %}{% if m.role == "control" %}[{{ m.content }}]{% else %}{{ m.content }}
    {% endif %}{% endfor %}""")
    server = start_local(chat_template=str(template), max_model_len=2048)
    tokens = post(server, "/tokenize", messages=[{"role": "control", "content": "short"}, *MESSAGES])["tokens"]
    assert post(server, "/detokenize", tokens=tokens)["text"].startswith("[short]What is")
    for path in ("/tokenize", "/v1/chat/completions"):
        status, found = server.post(path, {"messages": [*MESSAGES, {"role": "controls", "content": "short"}]})
        assert status == 400 and found["error"]["param"] == "messages.1.role", found
        assert "system, developer, user" in found["error"]["message"] and "'controls'" in found["error"]["message"]


def test_thoughts_have_both_their_names_and_are_counted(start_local: Callable[..., Any], tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    server = start_local(chat_template=str(template), max_model_len=2048)
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    whole = post(server, "/v1/chat/completions", **asked)
    message = whole["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] != "" and message["content"] == ""
    counted = post(server, "/tokenize", prompt=message["reasoning"], add_special_tokens=False)["count"]
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": min(counted, 12)}
    events = server.events("/v1/chat/completions", asked | {"stream_options": {"include_usage": True}})[:-1]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    told = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
    assert "".join(told) == message["reasoning"]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == told
    counts = whole["usage"]["completion_tokens_details"]
    assert events[-1]["usage"]["completion_tokens_details"] == counts

    hidden = post(server, "/v1/chat/completions", **asked, include_reasoning=False)
    assert hidden["usage"]["completion_tokens_details"] == counts
    assert hidden["choices"][0]["message"].keys().isdisjoint({"reasoning", "reasoning_content"})
    for event in server.events("/v1/chat/completions", asked | {"include_reasoning": False})[:-1]:
        assert event["choices"][0]["delta"].keys() <= {"role", "content"}


def test_the_first_chunk_of_a_chat_has_no_tokens_and_counts_none(server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked = {"messages": MESSAGES, "max_tokens": 3, "ignore_eos": True, "stream_options": options}
    counted = 0
    for event in server.events("/v1/chat/completions", asked | {"return_token_ids": True})[:-2]:
        counted += len(event["choices"][0].get("token_ids", []))
        assert event["usage"]["completion_tokens"] == counted
    assert counted == 3


def test_models_that_do_not_think_have_nothing_to_count(server: Any) -> None:
    found = post(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=2, include_reasoning=False)
    assert "completion_tokens_details" not in found["usage"] and found["choices"][0]["message"]["content"]
