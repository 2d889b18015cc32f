"""Draft tokens from text against a plain search, and what must not be seen across scopes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.choice import drafter_names
from slipstream.drafter.lookup import NUM_EVIDENCE, NGramDrafter, SuffixDrafter, evidence, vote
from slipstream.drafter.token_index import CROWDED, KEYS, TokenIndex
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.protocol import DraftRow
from slipstream.engine.testing.local import LocalEngine

texts = st.lists(st.integers(0, 3), max_size=60)


def row(tokens: list[int], num_prompt: int | None = None, scope: str = "", most: int = 4) -> DraftRow:
    table = np.zeros(400, np.int32)
    table[: len(tokens)] = tokens
    prompt = len(tokens) if num_prompt is None else num_prompt
    return DraftRow(0, scope, prompt, table, len(tokens), frozenset({"ngram", "suffix"}), most=most)


def search(text: list[int], context: list[int]) -> tuple[int, list[int]]:
    """What TokenIndex.matches promises, the slow way; all places."""
    best: tuple[int, list[int]] = (0, [])
    for key in KEYS:
        run = context[len(context) - key :]
        places = [place for place in range(key, len(text)) if text[place - key : place] == run]
        if len(context) < key or not places:
            break
        best = key, places
    return best


@given(texts, st.lists(st.integers(0, 60)), texts)
def test_matches_are_those_of_a_plain_search(text: list[int], cuts: list[int], context: list[int]) -> None:
    index = TokenIndex()
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for begin, end in pairwise(borders):
        index.extend(text[begin:end])
    for asked in (context, text):
        length, places = search(text[: len(index)], asked)
        assert index.matches(asked) == (length, places[-CROWDED:])


@given(st.lists(st.integers(0, 1), min_size=100, max_size=400), st.lists(st.integers(0, 1), max_size=40))
def test_where_text_repeats_itself_the_latest_places_of_the_longest_match_are_found(
    text: list[int], context: list[int]
) -> None:
    """Runs that occur many times are told apart by longer ones, which are known from then on."""
    index = TokenIndex()
    index.extend(text)
    for asked in (context, text, text[:70]):
        length, places = index.matches(asked)
        longest, everywhere = search(text, asked)
        assert length <= longest and len(places) <= CROWDED
        run = asked[len(asked) - length :]
        assert all(text[place - length : place] == run for place in places)
        if len(everywhere) > 3 * CROWDED:
            assert length == longest and places == everywhere[-len(places) :]


def test_a_long_match_is_found_behind_many_short_ones() -> None:
    """The answer to the same question, in text in which every line begins alike."""
    index = TokenIndex()
    lines = [[1, 2, 3, 100 + i, 1, 2, 4, 200 + i] for i in range(300)]
    index.extend([token for line in lines for token in line])
    length, [place] = index.matches([3, 150, 1, 2])
    assert (length, index.text[place : place + 2].tolist()) == (4, [4, 250])


def test_what_takes_memory_is_bounded_where_text_repeats_itself() -> None:
    index = TokenIndex()
    index.extend([7] * 20_000)
    assert sum(map(len, index._places.values())) <= len(KEYS) * 2 * CROWDED
    assert index.matches([7] * 40) == (KEYS[-1], list(range(20_000 - CROWDED, 20_000)))


@given(texts, st.integers(1, 6))
def test_ngram_proposes_what_followed_the_longest_match(text: list[int], most: int) -> None:
    [proposal] = NGramDrafter().propose([row(text, most=most)])
    length, places = search(text, text)
    if not places:
        assert proposal is None
        return
    assert proposal is not None
    following = [(text[place:] * most)[:most] for place in places[-CROWDED:]]
    assert proposal == vote(length, following, most)
    assert len(proposal.tokens) == most
    if len(places) == 1:
        assert proposal.tokens == following[0]


def test_what_follows_most_often_is_proposed_and_how_many_agree_tells_how_likely_it_is() -> None:
    proposal = vote(4, [[5, 6, 7], [5, 6, 8], [5, 9, 8], [5, 6, -1]], 3)
    assert proposal is not None
    assert proposal.tokens == [5, 6], "as many ended as went on with either, and the last one did"
    assert proposal.evidence == [evidence(4, 4, 4), evidence(3, 4, 5)]
    assert proposal.evidence[0] > proposal.evidence[1]
    proposal = vote(4, [[5, 6], [7, 8]], 2)
    assert proposal is not None and proposal.tokens == [7, 8], "of equals, what came last"
    assert vote(4, [[5], [-1]], 2) is None
    levels = {evidence(a, n, k) for n in range(1, 9) for a in range(1, n + 1) for k in range(2, 40)}
    assert levels == set(range(NUM_EVIDENCE))


def test_ngram_follows_the_row_as_it_grows() -> None:
    drafter, draft = NGramDrafter(), row([1, 2, 3, 4, 9, 1, 2])
    assert drafter.propose([draft])[0].tokens == [3, 4, 9, 1]  # type: ignore[union-attr]
    draft.tokens[7:9] = [3, 5]
    draft.length = 9
    assert drafter.propose([draft]) == [None]
    draft.tokens[9:11] = [9, 1]
    draft.length = 11
    assert drafter.propose([draft])[0].tokens == [2, 3, 5, 9]  # type: ignore[union-attr]


def test_suffix_knows_earlier_answers_of_its_scope_only() -> None:
    drafter = SuffixDrafter(1000)
    drafter.finish(row([1, 2, 3, 4, 5, 6], num_prompt=2, scope="a"))
    assert drafter.propose([row([9, 3, 4], scope="b")]) == [None]
    [proposal] = drafter.propose([row([9, 3, 4], scope="a")])
    assert proposal is not None and proposal.tokens == [5, 6]
    # The first draft token of an answer comes from the end of the prompt before it.
    [proposal] = drafter.propose([row([1, 2], scope="a")])
    assert proposal is not None and proposal.tokens == [3, 4, 5, 6]


def test_suffix_does_not_run_from_one_answer_into_the_next() -> None:
    drafter = SuffixDrafter(1000)
    drafter.finish(row([1, 2, 3, 4], num_prompt=2))
    drafter.finish(row([5, 6, 7, 8], num_prompt=2))
    assert drafter.propose([row([0, 3, 4])]) == [None]
    [proposal] = drafter.propose([row([2, 3])])
    assert proposal is not None and proposal.tokens == [4]


def test_a_request_that_does_not_use_it_teaches_it_nothing() -> None:
    drafter = SuffixDrafter(1000)
    private = row([1, 2, 3, 4], num_prompt=2)
    private.drafters = frozenset({"ngram"})
    drafter.finish(private)
    assert drafter.num_tokens == 0


def test_what_must_not_be_kept_is_not_remembered() -> None:
    drafter = SuffixDrafter(1000)
    private = row([1, 2, 3, 4], num_prompt=2)
    private.remember = False
    drafter.finish(private)
    assert drafter.num_tokens == 0 and drafter.propose([row([2, 3])]) == [None]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 120)), max_size=40))
def test_suffix_stays_within_its_capacity(answers: list[tuple[str, int]]) -> None:
    drafter = SuffixDrafter(200)
    for scope, length in answers:
        drafter.finish(row([1, *range(length)], num_prompt=1, scope=scope))
        assert drafter.num_tokens <= 200 + 1
        [proposal] = drafter.propose([row([1, 0], scope=scope)])
        if 2 < length < 80:
            assert proposal is not None, "what was learned last is there"


def test_names() -> None:
    def names(speculation: str, drafter: str | None = None) -> list[str]:
        return drafter_names(EngineConfig(speculation=speculation, drafter=drafter))

    assert names("off") == []
    assert names("auto") == ["ngram", "suffix"]
    assert names("auto", "random") == ["ngram", "suffix", "head"]
    assert names("suffix, ngram") == ["suffix", "ngram"]
    with pytest.raises(ConfigError, match="telepathy"):
        names("ngram,telepathy")
    with pytest.raises(ConfigError, match="--drafter"):
        names("head")


def test_no_tenant_gets_drafts_from_the_text_of_another(tmp_path: Path) -> None:
    """Through the whole engine: the same prompt again has draft tokens for its own tenant and cache salt only."""
    config = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    drafter = SuffixDrafter(10_000)
    options = EngineConfig(
        model=str(tmp_path), load_format="dummy", kv_cache_memory="8MiB", max_model_len=128, speculation_policy="fixed"
    )
    local = LocalEngine(options, [drafter])
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1)

    def drafts(**sender: object) -> int:
        [stats] = local.engine.runner.speculator.stats
        before = stats.draft_tokens
        local.submit([1, 2, 3, 4, 5], params, **sender)
        local.finish()
        return stats.draft_tokens - before

    assert drafts(tenant="alice", remember=False) == drafts(tenant="alice", remember=False) == 0, "nor remembered"
    assert drafts(tenant="alice") == 0, "nothing is known yet"
    local.submit([9], SamplingParams(max_tokens=1))  # what has ended is told with the next step
    local.finish()
    assert drafts(tenant="bob") == drafts(tenant="") == drafts(tenant="alice", cache_salt="s") == 0
    assert drafts(tenant="mallory\0b", cache_salt="c") == drafts(tenant="mallory", cache_salt="b\0c") == 0
    assert drafts(tenant="alice") > 10
