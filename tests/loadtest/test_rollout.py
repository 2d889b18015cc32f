import json
import math
from functools import partial
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from slipstream.clients.errors import ClientError
from slipstream.loadtest import rollout as module
from slipstream.loadtest.harness import connect
from slipstream.loadtest.rollout import (
    RolloutOptions,
    as_json,
    at,
    batches,
    describe,
    open_requests,
    print_rollout,
    rollout,
    switch,
)
from slipstream.loadtest.scrape import Tokens, parse_tokens
from slipstream.loadtest.workloads import Request

SMALL = {"prompts": 2, "samples": 3, "epochs": 2, "median_tokens": 3, "tail": 4.0, "longest": 30}


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 60), st.floats(1, 20), st.integers(0, 5))
def test_the_longest_answers_are_many_times_the_median(prompts, samples, median, tail, seed):
    options = RolloutOptions(
        prompts=prompts, samples=samples, median_tokens=median, tail=tail, longest=math.ceil(20 * median), seed=seed
    )
    lengths = sorted(options.lengths())
    assert len(lengths) == prompts * samples
    assert lengths[0] >= 1 and lengths[-1] <= options.longest
    middle = lengths[(len(lengths) - 1) // 2], lengths[len(lengths) // 2]
    assert middle[0] <= median <= middle[1]
    beyond = lengths[math.ceil(0.95 * len(lengths) + 0.5) :]
    assert all(length >= math.floor(tail * median) for length in beyond)


def test_epochs_have_the_same_prompts_and_lengths_and_other_samples():
    asked = [Request("/v1/chat/completions", {"messages": [name]}) for name in ("a", "b")]
    first, second = batches(asked, RolloutOptions(**SMALL))
    assert [request.body["messages"] for request in first] == [["a"]] * 3 + [["b"]] * 3
    for field in ("messages", "max_tokens", "min_tokens", "temperature"):
        assert [request.body[field] for request in first] == [request.body[field] for request in second]
    seeds = [request.body["seed"] for request in first + second]
    assert len(set(seeds)) == len(seeds)
    assert all(request.body["min_tokens"] == request.body["max_tokens"] for request in first)


def test_answers_may_end_where_the_model_ends_them():
    asked = [Request("/v1/chat/completions", {"messages": [name]}) for name in ("a", "b")]
    options = RolloutOptions(**SMALL, natural=True)
    first, _ = batches(asked, options)
    assert [request.body["max_tokens"] for request in first] == options.lengths()
    assert not any("min_tokens" in request.body for request in first)


def test_lengths_are_told_by_their_median_and_their_longest_twentieth():
    assert describe([*range(1, 21)]) == "210 tokens: median 11, the longest 5 % from 19, longest 20"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted), min_size=1, max_size=20))
def test_open_requests_begin_and_end_with_the_spans(spans):
    running = open_requests([tuple(span) for span in spans])
    assert running[-1][1] == 0
    for time, _ in running:
        if [moment for moment, _ in running].count(time) == 1:
            assert at(running, time) == sum(start <= time < end for start, end in spans)


def test_speculation_is_on_from_where_most_rows_verify_up_to_the_end():
    def seen(*shares):
        counts, found = Tokens(0, 0, 0), []
        for second, share in enumerate(shares):
            found.append((float(second), counts))
            if share is not None:
                counts = Tokens(counts.generated + 15, counts.drafts + 10 * share, counts.accepted + 5)
        return [*found, (float(len(shares)), counts)]

    assert switch(seen(0, 0, 1, 1)) == 2.0
    assert switch(seen(1, 0, 0, 1)) == 3.0
    assert switch(seen(0, 1, None, 1, None)) == 1.0
    assert switch(seen(1, 1, 0)) is None
    assert switch([]) is None


def test_tokens_of_a_server_without_speculation():
    assert parse_tokens("vllm:generation_tokens_total 7\n") == Tokens(7, 0, 0)
    assert parse_tokens("other 1\n") is None
    assert Tokens(0, 0, 0).per_step is None
    assert Tokens(15, 10, 5).per_step == pytest.approx(1.5)


async def test_servers_have_turns_in_alternating_order_and_the_table_says_who_was_faster(serve, tmp_path):
    arrived = []
    plot = tmp_path / "rollout.svg"
    options = RolloutOptions(**SMALL, plot=plot)
    async with serve(pace=0.001) as a, serve(pace=0.01) as b, connect(a.url) as target_a, connect(b.url) as target_b:
        for name, server in (("a", a), ("b", b)):
            server.on_request = partial(arrived.append, name)
        sides = await rollout({"quick": target_a, "slow": target_b}, options)
    assert arrived == ["a"] * 6 + ["b"] * 12 + ["a"] * 6
    assert a.most_running > 1, "a batch is sent at once"
    written = as_json(sides)
    assert [side["name"] for side in written] == ["quick", "slow"]
    for epoch in written[0]["epochs"]:
        assert epoch["failed"] == 0
        assert epoch["output_tokens"] == sum(options.lengths())
        assert epoch["faster"][0] == 1.0
        assert epoch["faster"][1] > 1.0
    console = Console(record=True, width=160)
    print_rollout(sides, options, console)
    assert "against slow" in console.export_text()
    module.plot_rollout(sides, plot)
    texts = "".join(ElementTree.parse(plot).getroot().itertext())
    assert "running requests" in texts
    assert "epoch 2" in texts


async def test_a_busy_server_is_not_measured(serve, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.1)
    async with serve(leak=1) as server, connect(server.url) as target:
        with pytest.raises(ClientError, match="for themselves"):
            await rollout({"one": target}, RolloutOptions(**SMALL))


async def test_a_failed_answer_is_told(serve):
    options = RolloutOptions(**SMALL | {"epochs": 1})
    async with serve() as server, connect(server.url) as target:
        server.fault = "error"
        sides = await rollout({"one": target}, options)
    [epoch] = as_json(sides)[0]["epochs"]
    assert epoch["failed"] == 1
    assert "scripted refusal" in json.dumps(epoch["errors"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "at least 1"),
        ({"longest": 5}, "--longest is 5"),
        ({"tail": 0.5}, "tail"),
        ({"pause": -1.0}, "at least 0"),
    ],
)
def test_what_cannot_be_asked_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        RolloutOptions(**SMALL | change)
