"""Speculation over HTTP: requests choose it, see what it did, and get the same answer with and without."""

from __future__ import annotations

from typing import Any

import pytest

PROMPT = "Repeat after me: one two three four five six seven eight nine ten. one two three four five six"
OFF = {"mode": "off"}


def drafted(server: Any, **speculation: Any) -> Any:
    """An answer in which draft tokens were accepted: the first one, unless the machine has stood still for a moment
    that was taken for the time of a step: then the server finds out again whether drafting pays.
    """
    asked = {"max_tokens": 60, "ignore_eos": True, "return_metrics": True, "speculation": speculation}
    for _ in range(100):
        reply = server.complete(PROMPT, **asked)
        if reply["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]:
            return reply
    raise AssertionError("nothing is drafted, or nothing is right")


def test_answers_are_the_same_and_drafts_were_accepted(default_server: Any) -> None:
    before = {name: default_server.metric(name) for name in SPEC_COUNTERS}
    drafted(default_server)
    for fields in ({}, {"temperature": 0.8, "seed": 3}, {"frequency_penalty": 0.4, "logprobs": 3}, {"stop": ["ten"]}):
        fields = {"max_tokens": 80, "ignore_eos": True, "return_token_ids": True, **fields}
        with_drafts = default_server.complete(PROMPT, **fields)
        without = default_server.complete(PROMPT, **fields, speculation=OFF)
        assert with_drafts["choices"] == without["choices"]
    default_server.wait_until_idle()
    after = {name: default_server.metric(name) for name in SPEC_COUNTERS}
    grown = {name: after[name] - before[name] for name in SPEC_COUNTERS}
    assert grown["spec_decode_num_draft_tokens_total"] >= grown["spec_decode_num_accepted_tokens_total"] > 0
    assert grown["spec_decode_num_accepted_tokens_per_pos_total"] == grown["spec_decode_num_accepted_tokens_total"]
    assert default_server.metric("speculation_steps_total", reason="worth it") > 0
    assert 0 < grown["spec_decode_verify_seconds_total"] < grown["step_seconds_total"]
    assert grown["spec_decode_draft_seconds_total"] > 0


SPEC_COUNTERS = (
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
    "spec_decode_verify_seconds_total",
    "spec_decode_draft_seconds_total",
    "step_seconds_total",
)


def test_metrics_of_an_answer(default_server: Any) -> None:
    metrics = drafted(default_server)["metrics"]
    speculative = metrics["speculative_decoding"]
    histogram = speculative["acceptance_histogram"]
    assert sum(histogram) == speculative["num_spec_steps"] > 0
    assert sum(i * n for i, n in enumerate(histogram)) == speculative["num_accepted_draft_tokens"]
    assert speculative["mean_acceptance_length"] == pytest.approx(
        1 + speculative["num_accepted_draft_tokens"] / speculative["num_spec_steps"], abs=1e-3
    )
    assert 0 <= metrics["queue_time_ms"] < metrics["time_to_first_token_ms"] < 300_000
    assert metrics["tokens_per_second"] > 0 and metrics["mean_itl_ms"] > 0
    fields = {"max_tokens": 60, "ignore_eos": True, "return_metrics": True}
    plain = default_server.complete(PROMPT, **fields, speculation=OFF)["metrics"]["speculative_decoding"]
    assert plain["num_spec_steps"] == plain["num_draft_tokens"] == 0 and plain["mean_acceptance_length"] == 1
    assert "metrics" not in default_server.complete(PROMPT, max_tokens=2)


@pytest.mark.parametrize("usage", [True, False])
def test_metrics_end_a_stream(default_server: Any, usage: bool) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "return_metrics": True}
    *events, last, done = default_server.events(
        "/v1/completions", body | ({"stream_options": {"include_usage": True}} if usage else {})
    )
    assert done == "[DONE]"
    assert last["choices"] == [] and last["metrics"]["time_to_first_token_ms"] > 0
    assert (last["usage"] is not None) == usage
    assert all("metrics" not in event for event in events)


def test_at_most_so_many_drafts(default_server: Any) -> None:
    reply = drafted(default_server, max_draft_tokens=2)
    assert 0 < len(reply["metrics"]["speculative_decoding"]["acceptance_histogram"]) <= 3


def test_unknown_drafters_are_refused_by_name(default_server: Any) -> None:
    status, reply = default_server.post("/v1/completions", {"prompt": "x", "speculation": {"mode": "telepathy"}})
    assert status == 400
    assert reply["error"]["param"] == "speculation.mode"
    assert "telepathy" in reply["error"]["message"] and "ngram" in reply["error"]["message"]
    status, reply = default_server.post("/v1/completions", {"prompt": "x", "speculation": {"max_draft_tokens": 0}})
    assert status == 400 and reply["error"]["param"] == "speculation.max_draft_tokens"
