"""/generate as trainers send it, and what they read of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import Any

import pytest

from tests.server.sglang.calls import PROMPT, TEXT, generate, refused


def values(entries: Any) -> list[Any]:
    return [entry[0] for entry in entries]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def ids(entries: Any) -> list[int]:
    return [entry[1] for entry in entries]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.8, "sampling_seed": 7}, {"temperature": 0.8, "seed": 7}),
        ({"sampling_seed": 3, "top_k": 20, "top_p": 0.9, "temperature": 1}, {"seed": 3, "top_k": 20, "top_p": 0.9}),
        ({"sampling_seed": 3, "top_k": 2**30, "repetition_penalty": 1.2}, {"seed": 3, "repetition_penalty": 1.2}),
        ({"logit_bias": {"100": 50}, "min_new_tokens": 8}, {"logit_bias": {"100": 50}, "min_tokens": 8}),
    ],
)
@pytest.mark.parametrize("mode", ["processed", "raw"])
def test_the_same_tokens_and_log_probabilities_as_in_the_other_dialect(
    server: Any, here: dict[str, Any], there: dict[str, Any], mode: str
) -> None:
    there = {"temperature": 1 if "seed" in there else 0} | there
    here = {"temperature": there["temperature"]} | here
    found = generate(server, sampling=here, return_logprob=True, top_logprobs_num=3, logprobs_mode=mode)
    other = server.complete(
        PROMPT,
        max_tokens=8,
        return_token_ids=True,
        logprobs=3,
        logprobs_mode=mode,
        return_tokens_as_token_ids=True,
        **there,
    )["choices"][0]
    assert found["text"] == other["text"]
    assert found["output_ids"] == other["token_ids"]
    meta = found["meta_info"]
    assert ids(meta["output_token_logprobs"]) == found["output_ids"]
    assert values(meta["output_token_logprobs"]) == other["logprobs"]["token_logprobs"]
    for top, expected in zip(meta["output_top_logprobs"], other["logprobs"]["top_logprobs"], strict=True):
        assert len(top) == 3
        assert {f"token_id:{token}": logprob for logprob, token, _ in top}.items() <= expected.items()


def test_log_probabilities_are_by_default_those_of_the_distribution_drawn_from(server: Any) -> None:
    asked = {"sampling": {"temperature": 0.5, "sampling_seed": 1}, "return_logprob": True}
    default, processed, raw = (
        values(generate(server, **asked, **mode)["meta_info"]["output_token_logprobs"])
        for mode in ({}, {"logprobs_mode": "processed"}, {"logprobs_mode": "raw"})
    )
    assert default == processed != raw


def test_what_trainers_read_of_one_answer(server: Any) -> None:
    found = generate(server, TEXT, return_logprob=True, rid="a rid", return_prompt_token_ids=True)
    assert set(found) == {"text", "output_ids", "meta_info", "prompt_token_ids"}
    meta = found["meta_info"]
    assert meta["id"] == "a rid"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert meta["prompt_tokens"] == len(found["prompt_token_ids"]) == 4
    assert meta["completion_tokens"] == len(found["output_ids"]) == meta["output_token_logprobs_length"] == 8
    assert meta["input_token_logprobs"] == []
    assert all(text is None for _, _, text in meta["output_token_logprobs"])
    assert 0 < meta["e2e_latency"] < 300 and meta["num_retractions"] == 0 <= meta["cached_tokens"] <= 4
    version = meta["weight_version"]
    assert meta["weight_versions"] == [{"version": version, "start": 0, "end": 8}]
    assert server.get("/get_weight_version")[1] == {"weight_version": version}
    plain = generate(server, TEXT)["meta_info"]
    assert not any("logprobs" in name for name in plain)
    with_text = generate(server, TEXT, return_logprob=True, return_text_in_logprobs=True)
    assert "".join(text for _, _, text in with_text["meta_info"]["output_token_logprobs"]) == found["text"]


def test_log_probabilities_of_the_prompt(server: Any) -> None:
    asked = {"sampling": {"max_new_tokens": 1}, "return_logprob": True, "top_logprobs_num": 2}
    other = server.complete(PROMPT, max_tokens=1, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    for start in (0, 1, 3, 4):
        for _ in range(2):  # the second time, what lies before may be in the cache
            meta = generate(server, **asked, logprob_start_len=start)["meta_info"]
            assert ids(meta["input_token_logprobs"]) == PROMPT[start:]
            assert len(meta["input_top_logprobs"]) == len(PROMPT) - start
            for entry, top, expected in zip(
                meta["input_token_logprobs"], meta["input_top_logprobs"], other[start:], strict=True
            ):
                assert entry[0] == (None if expected is None else expected[str(entry[1])]["logprob"])
                assert (top is None) == (expected is None)
                assert all(expected[str(token)]["logprob"] == logprob for logprob, token, _ in top or [])
    assert generate(server, **asked, logprob_start_len=5)["meta_info"]["input_token_logprobs"] == []
    error = refused(server, return_logprob=True, logprob_start_len=6)
    assert error["param"] == "logprob_start_len" and "5 tokens" in error["message"]


def test_a_long_prompt_is_scored_without_computing_what_is_cached(server: Any) -> None:
    prompt = [(7 * i) % 4000 + 300 for i in range(400)]
    whole = generate(server, prompt, return_logprob=True, logprob_start_len=0, sampling={"max_new_tokens": 1})
    again = generate(server, prompt, return_logprob=True, logprob_start_len=390, sampling={"max_new_tokens": 1})
    assert again["meta_info"]["cached_tokens"] > 300
    expected = whole["meta_info"]["input_token_logprobs"][390:]
    for entry, one in zip(again["meta_info"]["input_token_logprobs"], expected, strict=True):
        assert entry[1] == one[1] and entry[0] == pytest.approx(one[0], abs=1e-4)


def test_log_probabilities_of_chosen_tokens(server: Any) -> None:
    chosen = [504, 0, 49_151]
    meta = generate(
        server,
        return_logprob=True,
        logprob_start_len=2,
        top_logprobs_num=1,
        token_ids_logprob=chosen,
        logprobs_mode="raw",
    )["meta_info"]
    assert [ids(entries) for entries in meta["output_token_ids_logprobs"]] == [chosen] * 8
    assert [ids(entries) for entries in meta["input_token_ids_logprobs"]] == [chosen] * 3
    best = [top[0] for top in meta["output_top_logprobs"]]
    for entries, top in zip(meta["output_token_ids_logprobs"], best, strict=True):
        assert all(logprob <= top[0] for logprob in values(entries))
    same = generate(server, return_logprob=True, token_ids_logprob=[top[1] for top in best][:1], logprobs_mode="raw")[
        "meta_info"
    ]
    assert same["output_token_ids_logprobs"][0][0][:2] == best[0][:2]
    assert refused(server, return_logprob=True, token_ids_logprob=[60_000])["param"] == "logprob_token_ids"


def test_one_prompt_or_several_and_one_answer_or_several(server: Any) -> None:
    sampled = {"temperature": 1, "sampling_seed": 11}
    single = generate(server, sampling=sampled)
    assert isinstance(single, dict)
    [one] = generate(server, [PROMPT], sampling=sampled)
    assert one["output_ids"] == single["output_ids"]
    both = generate(server, [TEXT, "Once upon a time"], sampling=sampled)
    assert [answer["meta_info"]["prompt_tokens"] for answer in both] == [4, 4]
    several = generate(server, [PROMPT, [300]], sampling={**sampled, "n": 2}, rid="x")
    assert [answer["meta_info"]["id"] for answer in several] == ["x_0", "x_1", "x_2", "x_3"]
    assert several[0]["output_ids"] == single["output_ids"] != several[1]["output_ids"]
    assert [answer["meta_info"]["prompt_tokens"] for answer in several] == [5, 5, 1, 1]
    named = generate(server, [PROMPT, [300]], rid=["a", "b"])
    assert [answer["meta_info"]["id"] for answer in named] == ["a", "b"]
    assert refused(server, input_ids=[PROMPT, [300]], rid=["a", "a"])["param"] == "rid"
    generated = {answer["meta_info"]["id"] for answer in generate(server, [PROMPT, [300]], sampling={"n": 2})}
    assert len(generated) == 4


def test_each_prompt_of_a_batch_may_ask_for_something_else(server: Any) -> None:
    found = generate(
        server,
        [PROMPT, PROMPT, TEXT_IDS],
        sampling_params=[
            {"max_new_tokens": 3, "temperature": 0},
            {"max_new_tokens": 5, "temperature": 1, "sampling_seed": 4},
            {"max_new_tokens": 2, "temperature": 0, "min_new_tokens": 2},
        ],
        return_logprob=[True, False, True],
        top_logprobs_num=[0, 0, 2],
        logprob_start_len=[-1, -1, 1],
        token_ids_logprob=[[5], [], [6, 7]],
        extra_key=["a", "", None],
    )
    assert [answer["meta_info"]["completion_tokens"] for answer in found] == [3, 5, 2]
    first, second, third = (answer["meta_info"] for answer in found)
    assert "output_token_logprobs" not in second and "output_top_logprobs" not in first
    assert [ids(entries) for entries in first["output_token_ids_logprobs"]] == [[5]] * 3
    assert [ids(entries) for entries in third["output_token_ids_logprobs"]] == [[6, 7]] * 2
    assert ids(third["input_token_logprobs"]) == TEXT_IDS[1:]
    alone = generate(server, sampling={"max_new_tokens": 5, "temperature": 1, "sampling_seed": 4})
    assert found[1]["output_ids"] == alone["output_ids"]
    nothing = generate(
        server,
        [PROMPT, TEXT_IDS],
        sampling_params=[None, {"max_new_tokens": 2, "temperature": 0}],
        return_logprob=[None, True],
        **{"top_logprobs_num": [None, 1], "logprob_start_len": [None, 1], "token_ids_logprob": [None, [6]]},
        **{"image_data": [None, []], "lora_path": [None, None]},
    )
    assert "output_token_logprobs" not in nothing[0]["meta_info"]
    assert nothing[1]["output_ids"] == found[2]["output_ids"]
    assert [ids(entries) for entries in nothing[1]["meta_info"]["output_token_ids_logprobs"]] == [[6]] * 2
    for field, value in (("sampling_params", [{}]), ("return_logprob", [True] * 4), ("rid", ["a"])):
        assert refused(server, input_ids=[PROMPT, PROMPT], **{field: value})["param"] == field
    assert "the same for all" in refused(server, input_ids=[PROMPT, PROMPT], sampling_params=[{"n": 2}, {}])["message"]


TEXT_IDS = [504, 2365]


def test_why_an_answer_ended(server: Any) -> None:
    whole = generate(server)
    token = whole["output_ids"][3]
    before = whole["output_ids"].index(token)
    stopped = generate(server, sampling={"stop_token_ids": [token]}, return_logprob=True)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert stopped["output_ids"] == whole["output_ids"][: before + 1]
    assert len(stopped["meta_info"]["output_token_logprobs"]) == before + 1
    kept = generate(server, sampling={"stop_token_ids": [token], "no_stop_trim": True})
    assert kept["output_ids"] == stopped["output_ids"] and len(kept["text"]) > len(stopped["text"])
    assert whole["text"].startswith(kept["text"])
    ignored = generate(server, sampling={"stop_token_ids": [token], "ignore_eos": True})
    assert ignored["output_ids"] == whole["output_ids"], "as SGLang has it"
    later = generate(server, sampling={"stop_token_ids": [token], "min_new_tokens": before + 2})
    assert len(later["output_ids"]) > before + 1
    letters = whole["text"][4:6]
    by_text = generate(server, sampling={"stop": letters})
    assert by_text["meta_info"]["finish_reason"] == {"type": "stop", "matched": letters}
    assert by_text["text"] == whole["text"].partition(letters)[0]
    assert generate(server, sampling={"stop": [letters], "no_stop_trim": True})["text"].endswith(letters)


def test_how_many_tokens(server: Any) -> None:
    # Of a model that says anything, so the end of a text may come at any time.
    forever = {"ignore_eos": True, "temperature": 0}
    status, answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": forever})
    assert status == 200 and answer["meta_info"]["finish_reason"] == {"type": "length", "length": 128}
    none = generate(server, sampling={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0)
    assert none["meta_info"]["finish_reason"] == {"type": "length", "length": 0} and none["output_ids"] == []
    assert len(none["meta_info"]["input_token_logprobs"]) == 5


def test_how_many_tokens_there_is_room_for(start_local: Callable[..., Any]) -> None:
    server, forever = start_local(max_model_len=256), {"ignore_eos": True, "temperature": 0}
    near = [400] * 254
    rest = generate(server, near, sampling_params={**forever, "max_new_tokens": None})
    assert len(rest["output_ids"]) == 2
    assert len(generate(server, near, sampling_params=forever)["output_ids"]) == 2, "the default gives way"
    error = refused(server, input_ids=near, sampling_params={"max_new_tokens": 3})
    assert error["param"] == "sampling_params.max_new_tokens" and error["code"] == "context_length_exceeded"
    assert refused(server, sampling_params={"max_new_tokens": 3, "min_new_tokens": 4})["param"].endswith(
        "min_new_tokens"
    )


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_stream_adds_up_to_the_answer(server: Any, incremental: bool, interval: int) -> None:
    sampling = {"max_new_tokens": 20, "temperature": 1, "sampling_seed": 5, "n": 2, "stream_interval": interval}
    asked = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5, 6], "logprob_start_len": 3}
    whole = generate(server, sampling=sampling, **asked, rid="r")
    body = {"input_ids": PROMPT, "sampling_params": sampling, **asked, "rid": "r"}
    events = server.events("/generate", body | {"incremental_streaming_output": incremental})
    assert events.pop() == "[DONE]"
    lists = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
    for index, answer in enumerate(whole):
        mine = [event for event in events if event["index"] == index]
        last = mine[-1]
        for name in ("id", "finish_reason", "prompt_tokens", "completion_tokens", "input_token_logprobs"):
            assert last["meta_info"][name] == answer["meta_info"][name]
        assert all(event["meta_info"]["finish_reason"] is None for event in mine[:-1])
        counts = [event["meta_info"]["completion_tokens"] for event in mine]
        assert all(later - sooner >= interval for sooner, later in pairwise(counts[:-1]))
        if incremental:
            assert "".join(event["text"] for event in mine) == answer["text"]
            assert joined(event["output_ids"] for event in mine) == answer["output_ids"]
            for name in lists:
                assert joined(event["meta_info"][name] for event in mine) == answer["meta_info"][name]
        else:
            assert (last["text"], last["output_ids"]) == (answer["text"], answer["output_ids"])
            for event, count in zip(mine, counts, strict=True):
                assert answer["text"].startswith(event["text"]) and len(event["output_ids"]) == count
                for name in lists:
                    assert event["meta_info"][name] == answer["meta_info"][name][:count]


def test_speculation_as_trainers_count_it(server: Any) -> None:
    for _ in range(100):  # while the server tries whether drafting pays again
        meta = generate(server, [400] * 30, sampling={"max_new_tokens": 64, "ignore_eos": True})["meta_info"]
        if meta["spec_verify_ct"]:
            break
    steps, right, drafted = meta["spec_verify_ct"], meta["spec_num_correct_drafts"], meta["spec_num_proposed_drafts"]
    assert 0 < steps < 64 and 0 <= right <= drafted
    assert sum(meta["spec_correct_drafts_histogram"]) == steps
    assert sum(i * count for i, count in enumerate(meta["spec_correct_drafts_histogram"])) == right
    assert meta["spec_accept_length"] == 64 / steps
    assert (meta["spec_accept_token_num"], meta["spec_draft_token_num"]) == (right, drafted)


def test_the_log_has_no_errors(server: Any) -> None:
    """An answer may be whole and what comes after it may fail."""
    generate(server)
    generate(server, rid="one of mine", sampling={"n": 2})
    server.wait_until(lambda: not server.service.control.open_requests)
    assert not [line for line in server.log if " ERROR " in line]
