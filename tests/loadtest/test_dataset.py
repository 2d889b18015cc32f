import json
from itertools import islice
from random import Random
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.loadtest.dataset import ShareGPT, estimate_tokens, is_mostly_ascii

RECORDS = [
    {"id": f"r{number}", "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "ok"}]}
    for number, text in enumerate(['plain {"id": 3}', 'quotes \\" and \\\\', '{ "id" : "fake" }', "日本語\n[]"])
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_records_are_found_whatever_their_text_and_layout(tmp_path, indent, ascii_only):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only), "utf-8")
    with ShareGPT(path) as data:
        found = [conversation for _, conversation in data.conversations()]
        assert [c.id for c in found] == ["r0", "r1", "r2", "r3"]
        assert [c.question() for c in found] == [r["conversations"][0]["value"] for r in RECORDS]


def test_a_record_cut_off_is_skipped_and_any_offset_finds_the_next_one(tmp_path):
    path = tmp_path / "data.json"
    text = json.dumps(RECORDS)
    path.write_text(text[: text.index('"r3"') + 40])
    with ShareGPT(path) as data:
        starts = [start for start, _ in data.conversations()]
        assert len(starts) == 3
        for offset in range(len(text) - 80):
            following = [start for start in starts if start >= offset]
            assert [start for start, _ in data.conversations(offset)] == following


def test_shuffled_gives_every_record_once_in_an_order_of_the_seed(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS * 1))
    with ShareGPT(path) as data:
        orders = {tuple(c.id for c in data.shuffled(Random(seed))) for seed in range(10)}
        assert all(sorted(order) == ["r0", "r1", "r2", "r3"] for order in orders)
        assert len(orders) > 1


def test_a_few_hundred_conversations_of_the_real_file_load_without_the_rest(sharegpt):
    start = process_time()
    with ShareGPT(sharegpt) as data:
        ids = [conversation.id for conversation in islice(data.shuffled(Random(0)), 300)]
    few = process_time() - start
    assert len(set(ids)) > 250
    with ShareGPT(sharegpt) as data:
        assert sum(1 for _ in data.conversations()) == 17_671
    assert few < (process_time() - start - few) / 2


def test_passages_are_long_english_text(sharegpt):
    with ShareGPT(sharegpt) as data:
        for passage in islice(data.passages(Random(5), 20_000), 5):
            assert len(passage) >= 20_000
            assert is_mostly_ascii(passage)


@given(st.text(max_size=200), st.text(max_size=200))
def test_estimated_tokens_grow_with_the_text(a, b):
    assert estimate_tokens(a + b) >= max(estimate_tokens(a), estimate_tokens(b))
    assert (estimate_tokens(a) > 0) == bool(a)
