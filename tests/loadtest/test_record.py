import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.clients.sse import Chunk
from slipstream.loadtest.record import RequestRecord

# (gap before the chunk in seconds, tokens in it)
chunk_lists = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=30)


def record_of(chunks, *, counted=True, usage=True) -> RequestRecord:
    record = RequestRecord(due=0.0, start=0.0)
    now = total = 0
    for gap, tokens in chunks:
        now, total = now + gap, total + tokens
        data = {"choices": [{"delta": {"content": "x" * tokens}}]}
        if counted:
            data["usage"] = {"prompt_tokens": 5, "completion_tokens": total}
        record.add(Chunk(now, data))
    record.add(Chunk(now, {"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    if usage:
        record.add(Chunk(now, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": total}}))
    return record


@given(chunk_lists)
def test_per_token_latencies_share_out_the_whole_time_after_the_first_chunk(chunks):
    record = record_of(chunks)
    span = record.chunk_times[-1] - record.chunk_times[0]
    assert len(record.token_itl()) == sum(tokens for _, tokens in chunks[1:])
    assert sum(record.token_itl()) == pytest.approx(span)
    assert sum(record.itl()) == pytest.approx(span)
    assert len(record.itl()) == len(chunks) - 1
    assert record.ttft() == record.chunk_times[0] == chunks[0][0]
    assert record.e2el() == record.chunk_times[-1]
    if (tpot := record.tpot()) is not None:
        assert tpot * (record.output_tokens - 1) == pytest.approx(span)


@given(chunk_lists)
def test_one_token_per_chunk_makes_both_latencies_equal(chunks):
    record = record_of([(gap, 1) for gap, _ in chunks])
    assert record.token_itl() == record.itl()


@given(chunk_lists)
def test_without_counts_per_chunk_the_final_usage_decides_what_is_known(chunks):
    record = record_of(chunks, counted=False)
    total = sum(tokens for _, tokens in chunks)
    assert record.output_tokens == total
    assert record.prompt_tokens == 5
    assert record.tokens_per_chunk() == ([1] * len(chunks) if total == len(chunks) else None)
    assert (record.token_itl() is None) == (total != len(chunks))


@given(chunk_lists)
def test_without_any_usage_a_chunk_counts_as_a_token(chunks):
    record = record_of(chunks, counted=False, usage=False)
    assert record.completion_tokens is None
    assert record.output_tokens == len(chunks)
    assert record.token_itl() is None


def test_token_ids_count_tokens_too():
    record = RequestRecord(due=0.0, start=0.0)
    record.add(Chunk(1.0, {"choices": [{"text": "a", "token_ids": [4]}]}))
    record.add(Chunk(4.0, {"choices": [{"text": "bcd", "token_ids": [5, 6, 7]}]}))
    assert record.output_tokens == 4
    assert record.token_itl() == [1.0, 1.0, 1.0]


def test_roles_and_finish_reasons_are_no_tokens():
    record = RequestRecord(due=0.0, start=0.0)
    record.add(Chunk(1.0, {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None}))
    record.add(Chunk(2.0, {"choices": [{"delta": {"content": "a"}}]}))
    record.add(Chunk(3.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    assert record.ttft() == 2.0
    assert record.chunk_times == [2.0]
    assert record.e2el() == 3.0
    assert record.finish_reasons == ["stop"]


def test_tokens_without_text_count_and_text_without_tokens_passes_its_time_on():
    """Half a UTF-8 character is held back by servers: a token without text now, text without a token at the end."""

    def chunk(time, text, total):
        return Chunk(time, {"choices": [{"text": text}], "usage": {"completion_tokens": total}})

    record = RequestRecord(due=0.0, start=0.0)
    for each in (chunk(1, "a", 1), chunk(2, "", 2), chunk(3, "b", 2), chunk(5, "c", 3), chunk(6, "d", 3)):
        record.add(each)
    record.add(Chunk(6, {"choices": [], "usage": {"completion_tokens": 3}}))
    assert record.chunk_times == [1, 2, 3, 5, 6]
    assert record.itl() == [1, 1, 2, 1]
    assert record.token_itl() == [1, 3]


def test_a_request_without_tokens_has_no_latencies():
    record = RequestRecord(due=0.0, start=0.0)
    record.add(Chunk(1.0, {"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    assert (record.ttft(), record.tpot(), record.itl(), record.output_tokens) == (None, None, [], 0)


@pytest.mark.parametrize("field", ["content", "reasoning_content", "reasoning", "tool_calls"])
def test_every_kind_of_chat_output_is_a_token(field):
    record = RequestRecord(due=0.0, start=0.0)
    record.add(Chunk(1.0, {"choices": [{"delta": {field: "x"}}]}))
    assert record.ttft() == 1.0
