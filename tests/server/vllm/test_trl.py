"""The generating routes of trl vllm-serve: shapes that TRL's client reads."""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import pytest

FRANCE, WEATHER = [504, 2365, 6354, 16438], [400, 9, 17]
FIXED = {"temperature": 0, "max_tokens": 5, "generation_kwargs": {"ignore_eos": True}}


def ask(server: Any, path: str, *, status: int = 200, **fields: Any) -> Any:
    found, reply = server.post(path, fields)
    assert found == status, reply
    return reply


def test_choices_of_a_prompt_come_before_those_of_the_next(server: Any) -> None:
    reply = ask(server, "/generate/", prompts=[FRANCE, WEATHER], n=2, **FIXED)
    assert reply["prompt_ids"] == [FRANCE, WEATHER]
    said = [
        server.complete(prompt, max_tokens=5, ignore_eos=True, return_token_ids=True)["choices"][0]["token_ids"]
        for prompt in (FRANCE, WEATHER)
    ]
    assert reply["completion_ids"] == [said[0], said[0], said[1], said[1]]
    assert reply["logprob_token_ids"] == [[[token] for token in answer] for answer in reply["completion_ids"]]
    assert all(len(row) == 1 and row[0] <= 0 for answer in reply["logprobs"] for row in answer)


def test_texts_are_tokenized(server: Any) -> None:
    tokens = server.post("/tokenize", {"prompt": "What is the capital"})[1]["tokens"]
    reply = ask(server, "/generate/", prompts=["What is the capital", "Hello"], **FIXED)
    assert reply["prompt_ids"][0] == tokens and len(reply["prompt_ids"]) == 2


def test_log_probabilities_are_those_of_what_was_sampled_from(server: Any) -> None:
    """TRL's server tells processed ones: importance ratios are made of them."""
    fields = {"temperature": 0.5, "top_k": 4, "max_tokens": 8, "generation_kwargs": {"seed": 7, "ignore_eos": True}}
    reply = ask(server, "/generate/", prompts=[FRANCE], logprobs=6, **fields)
    same = {"temperature": 0.5, "top_k": 4, "max_tokens": 8, "seed": 7, "ignore_eos": True, "logprobs": 6}
    said = server.complete(FRANCE, logprobs_mode="processed", return_token_ids=True, **same)["choices"][0]
    assert reply["completion_ids"] == [said["token_ids"]]
    for at, (logprobs, ids) in enumerate(zip(reply["logprobs"][0], reply["logprob_token_ids"][0], strict=True)):
        assert logprobs == sorted(logprobs, reverse=True) and len(set(ids)) == len(ids) == 6
        assert sum(map(math.exp, logprobs[:4])) == pytest.approx(1, abs=1e-4), "of the four that were left"
        mine = logprobs[ids.index(said["token_ids"][at])]
        assert mine == said["logprobs"]["token_logprobs"][at]


def test_a_sampled_token_outside_of_the_likeliest_is_the_last(server: Any) -> None:
    fields = {"temperature": 2, "max_tokens": 20, "logprobs": 1, "generation_kwargs": {"seed": 1, "ignore_eos": True}}
    reply = ask(server, "/generate/", prompts=[FRANCE], **fields)
    rows = list(zip(reply["completion_ids"][0], reply["logprob_token_ids"][0], strict=True))
    assert all(len(ids) in (1, 2) and ids[-1] == token for token, ids in rows)
    assert any(len(ids) == 2 for _, ids in rows)


def test_none_are_told_where_none_are_wanted(server: Any) -> None:
    reply = ask(server, "/generate/", prompts=[FRANCE], logprobs=None, **FIXED)
    assert reply["logprobs"] is None and reply["logprob_token_ids"] is None


def test_generation_kwargs_override_what_stands_beside_them(server: Any) -> None:
    reply = ask(server, "/generate/", prompts=[FRANCE], max_tokens=2, generation_kwargs={"max_tokens": 4, "n": 2})
    assert len(reply["completion_ids"]) == 2 and len(reply["completion_ids"][0]) in (1, 2, 3, 4)


@pytest.mark.parametrize("name", ["structured_outputs_regex", "guided_decoding_regex"])
def test_answers_follow_a_regular_expression(server: Any, name: str) -> None:
    reply = ask(server, "/generate/", prompts=[FRANCE], **{name: "[0-9]{3}"}, max_tokens=8)
    text = server.post("/detokenize", {"tokens": reply["completion_ids"][0]})[1]["prompt"]
    assert text[:3].isdigit()


def test_sixteen_tokens_are_the_default(server: Any) -> None:
    reply = ask(server, "/generate/", prompts=[FRANCE], generation_kwargs={"ignore_eos": True})
    assert len(reply["completion_ids"][0]) == 16


def test_conversations(server: Any) -> None:
    messages = [[{"role": "user", "content": text}] for text in ("Hi", "What is the capital of France?")]
    reply = ask(server, "/chat/", messages=messages, temperature=0, max_tokens=5)
    for at, conversation in enumerate(messages):
        said = server.chat(conversation[0]["content"], max_tokens=5, return_token_ids=True)
        assert reply["prompt_ids"][at] == said["prompt_token_ids"]
        assert reply["completion_ids"][at] == said["choices"][0]["token_ids"]


def test_scores_of_what_others_have_said(server: Any) -> None:
    sequences = [FRANCE, WEATHER]
    fields = {"sequences": sequences, "prompt_lengths": [1, 2], "top_logprobs": 3}
    plain = ask(server, "/get_sequence_logprobs/", **fields)
    packed = ask(server, "/get_sequence_logprobs/", response_format="binary", **fields)
    assert packed["shape"] == [2, 3, 3] and packed["completion_lengths"] == [3, 1]
    numbers = {
        name: array(kind, base64.b64decode(packed[name]))
        for name, kind in (
            *(("logprobs_b64", "f"), ("token_ids_b64", "i")),
            *(("actual_logprobs_b64", "f"), ("actual_token_ids_b64", "i")),
        )
    }
    assert list(numbers["actual_token_ids_b64"]) == [*FRANCE[1:], WEATHER[2], 0, 0]
    for index, sequence in enumerate(sequences):
        said = server.complete(sequence, max_tokens=1, prompt_logprobs=3)["choices"][0]["prompt_logprobs"]
        for at, entry in enumerate(said[fields["prompt_lengths"][index] :]):
            actual = entry[str(sequence[fields["prompt_lengths"][index] + at])]["logprob"]
            assert numbers["actual_logprobs_b64"][index * 3 + at] == pytest.approx(actual, abs=1e-6)
            best = sorted(entry.items(), key=lambda item: item[1]["rank"])
            assert plain["logprob_token_ids"][index][at] == [int(token) for token, _ in best]
            assert plain["logprobs"][index][at] == [found["logprob"] for _, found in best]
            first = (index * 3 + at) * 3
            assert list(numbers["token_ids_b64"][first : first + 3]) == [int(token) for token, _ in best[:3]]
    assert math.isinf(numbers["logprobs_b64"][(1 * 3 + 1) * 3])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/generate/", {"prompts": []}, "prompts"),
        ("/generate/", {"prompts": [[]]}, "prompts.0"),
        ("/generate/", {"prompts": [FRANCE], "images": [["x"]]}, "images.0"),
        ("/generate/", {"prompts": [FRANCE], "generation_kwargs": {"n": 0}}, "generation_kwargs.n"),
        ("/generate/", {"prompts": [FRANCE], "max_tokens": 0}, "max_tokens"),
        ("/generate/", {"prompts": [FRANCE] * 2, "n": 1000}, "n"),
        ("/chat/", {"messages": []}, "messages"),
        ("/chat/", {"messages": [[]]}, "messages.0"),
        ("/get_sequence_logprobs/", {"sequences": [FRANCE], "prompt_lengths": [5]}, "prompt_lengths.0"),
        ("/get_sequence_logprobs/", {"sequences": [FRANCE], "prompt_lengths": []}, "prompt_lengths"),
        (
            "/get_sequence_logprobs/",
            {"sequences": [FRANCE], "prompt_lengths": [1], "temperature": 0.5, "top_logprobs": 1},
            "temperature",
        ),
    ],
)
def test_errors_name_the_field(server: Any, path: str, fields: Any, param: str) -> None:
    assert ask(server, path, status=400, **fields)["error"]["param"] == param


def test_its_health(server: Any) -> None:
    assert server.get("/health/") == (200, {"status": "ok"})
