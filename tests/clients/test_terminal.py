import io

import pytest
from rich.console import Console

from slipstream.clients.errors import APIError
from slipstream.clients.terminal import Conversation, Speed, Terminal


class Server:
    """Answers with what it was asked, two words a step; ``knows`` Slipstream's fields or does not."""

    def __init__(self, knows=True):
        self.knows = knows
        self.asked = []

    def chat_stream(self, body):
        self.asked.append(body)
        if not self.knows and "return_metrics" in body:
            raise APIError(400, "unknown field return_metrics")
        question = body["messages"][-1]["content"]
        if question == "fail":
            raise APIError(500, "broken")
        yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        for number, word in enumerate((f"[b]{question}", "\nagain"), 1):
            usage = {"usage": {"completion_tokens": 2 * number}} if self.knows else {}
            yield {"choices": [{"delta": {"content": word}, "finish_reason": None}], **usage}
        yield {"choices": [{"delta": {}, "finish_reason": "length"}]}
        if self.knows:
            drafting = {"num_accepted_draft_tokens": 1}
            yield {"choices": [], "usage": {"completion_tokens": 4}, "metrics": {"speculative_decoding": drafting}}


def talked(server, *lines, terminal=False, system=""):
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None, highlight=False)
    conversation = Conversation(system)
    status = Terminal(server, {"model": "m"}, conversation, console).run(iter(lines))
    return status, out.getvalue(), conversation


@pytest.mark.parametrize("terminal", [False, True])
def test_questions_are_answered_and_remembered(terminal):
    server = Server()
    status, shown, _ = talked(server, "one", "two", "/quit", "three", terminal=terminal, system="be short")
    assert status == 0
    assert "[b]one" in shown
    assert "again" in shown
    assert "4 tokens" in shown
    assert "1.33 per step, cut off by max_tokens" in shown
    assert [[message["content"] for message in body["messages"]] for body in server.asked] == [
        ["be short", "one"],
        ["be short", "one", "[b]one\nagain", "two"],
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_for_terminals_only_and_are_not_remembered(name):
    class Thinking(Server):
        def chat_stream(self, body):
            for delta in ({name: "hm,\nlet"}, {name: " me see"}, {"content": "It is"}, {"content": " four."}):
                yield {"choices": [{"delta": delta}]}

    _, shown, conversation = talked(Thinking(), "2 + 2?", terminal=True)
    assert "hm,\n" in shown and "let me see\n" in shown and "It is four.\n" in shown
    _, piped, _ = talked(Thinking(), "2 + 2?")
    assert piped == "It is four.\n4 tokens" + piped.partition("4 tokens")[2]
    assert [turn["content"] for turn in conversation.turns] == ["2 + 2?", "It is four."]


def test_a_server_that_knows_less_is_asked_for_less():
    server = Server(knows=False)
    status, shown, _ = talked(server, "one", "two")
    assert status == 0
    assert "return_metrics" not in server.asked[-1]
    assert len(server.asked) == 3
    assert "2 tokens" in shown


def test_a_question_that_fails_leaves_no_trace():
    status, shown, conversation = talked(Server(), "fail", "one")
    assert status == 1
    assert "error: 500" in shown
    assert [turn["content"] for turn in conversation.turns] == ["one", "[b]one\nagain"]


def test_commands():
    _, shown, conversation = talked(Server(), "one", "two", "/undo", "/system be kind", "/what")
    assert [turn["content"] for turn in conversation.turns] == ["one", "[b]one\nagain"]
    assert conversation.messages[0] == {"role": "system", "content": "be kind"}
    assert "/new begins anew" in shown
    assert talked(Server(), "one", "/new")[2].turns == []


def test_speed_is_of_what_came_after_the_first_chunk():
    speed = Speed()
    for moment, tokens in ((1.0, 2), (2.0, 4), (3.0, 6)):
        speed.see({"choices": [{"delta": {"content": "x"}}], "usage": {"completion_tokens": tokens}}, moment)
    assert str(speed) == "6 tokens, 2.0 per second, 2.00 per step"
    assert str(Speed()) == "0 tokens"
