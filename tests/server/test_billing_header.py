"""What Claude Code says about who pays, at the beginning of its prompts and another with each, is no part of them."""

from __future__ import annotations

from typing import Any

import pytest

HEADER = "x-anthropic-billing-header: cc_version=2.1.220.300; cc_entrypoint=cli; cch=7adab;"
SYSTEM = "You are a Claude agent. " * 12
QUESTION = {"role": "user", "content": "Hello"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def counted(server: Any, system: Any) -> int:
    status, found = server.post("/v1/messages/count_tokens", {"messages": [QUESTION], "system": system})
    assert status == 200, found
    tokens: int = found["input_tokens"]
    return tokens


def shown(server: Any, role: str, content: Any) -> str:
    status, found = server.post("/tokenize", {"messages": [{"role": role, "content": content}, QUESTION]})
    assert status == 200, found
    said: str = server.post("/detokenize", {"tokens": found["tokens"]})[1]["prompt"]
    return said


@pytest.mark.parametrize("system", [f"{HEADER}\n{SYSTEM}", [text(HEADER), text(SYSTEM)], [text(SYSTEM), text(HEADER)]])
def test_it_is_left_out_of_the_system_prompt(server: Any, system: Any) -> None:
    assert counted(server, system) == counted(server, SYSTEM)
    for role in ("system", "developer"):
        assert shown(server, role, system) == shown(server, role, SYSTEM)


def test_so_the_next_request_finds_the_prompt_in_the_cache(server: Any) -> None:
    cached = []
    for mark in ("7adab", "986dd"):
        system = [text(HEADER.replace("7adab", mark)), text(SYSTEM)]
        body = {"messages": [QUESTION], "system": system, "max_tokens": 1, "cache_salt": "billing"}
        status, found = server.post("/v1/messages", body)
        assert status == 200, found
        cached.append(found["usage"]["cache_read_input_tokens"])
    assert cached[0] == 0 and cached[1] >= 48


@pytest.mark.parametrize(("role", "words"), [("system", f"Quote: {HEADER}"), ("user", f"{HEADER}\nHello")])
def test_elsewhere_it_stays(server: Any, role: str, words: str) -> None:
    assert HEADER in shown(server, role, words)
    inline = {"role": role, "content": [text(words)]}
    status, found = server.post("/v1/messages/count_tokens", {"messages": [QUESTION, inline]})
    without = server.post("/v1/messages/count_tokens", {"messages": [QUESTION, inline | {"content": [text("")]}]})[1]
    assert status == 200 and found["input_tokens"] > without["input_tokens"] + 10
