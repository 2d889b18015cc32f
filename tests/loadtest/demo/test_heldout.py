from slipstream.clients.errors import APIError
from slipstream.loadtest.demo.heldout import Answer, Answers, HeldOut
from slipstream.loadtest.harness import Target
from slipstream.loadtest.workloads import CHAT, Request


class Scripted:
    """A client whose head gets every other token for nothing."""

    def __init__(self, fails=()):
        self.bodies = []
        self.fails = fails

    async def chat(self, body):
        self.bodies.append(body)
        if len(self.bodies) in self.fails:
            raise APIError(500, "no")
        accepted = 4 if body["speculation"]["mode"] == "head" else 0
        return {
            "usage": {"completion_tokens": 9},
            "metrics": {"speculative_decoding": {"num_accepted_draft_tokens": accepted}},
            "choices": [{"message": {"content": body["messages"][0]["content"]}}],
        }


def requests(count):
    return [Request(CHAT, {"messages": [{"role": "user", "content": f"question {i}"}]}) for i in range(count)]


def test_accept_length_counts_tokens_per_step_after_the_first():
    answers = Answers([Answer(1.0, 9, 4, ""), Answer(1.0, 5, 0, "")])
    assert answers.accept_length == (8 + 4) / (4 + 4)
    assert answers.tokens_per_second == 7
    assert answers.first(1).accept_length == 2
    assert Answers().accept_length == 1


async def test_modes_take_turns_and_nothing_is_computed_twice_for_the_same_prompt():
    client, heldout = Scripted(), HeldOut(requests(4))
    off, head = await heldout.compare(Target(client, "m", True, None))
    assert [body["speculation"]["mode"] for body in client.bodies] == ["off", "head", "head", "off"] * 2
    assert off.texts == head.texts == [f"question {i}" for i in range(4)]
    assert (off.accept_length, head.accept_length) == (1, 2)
    await heldout.measure(Target(client, "m", True, None), "head", 2)
    cached = [(body["messages"][0]["content"], body["cache_salt"]) for body in client.bodies]
    assert len(set(cached)) == len(cached) == heldout.sent == 10


async def test_failures_are_counted():
    heldout = HeldOut(requests(3))
    answers = await heldout.measure(Target(Scripted(fails=(2,)), "m", True, None), "head")
    assert (heldout.sent, heldout.failed, len(answers.answers)) == (3, 1, 3)
