from hypothesis import given
from hypothesis import strategies as st

from slipstream.clients.sse import SSEDecoder

lines = st.binary(min_size=1, max_size=20).filter(lambda data: not set(data) & set(b"\r\n") and data[:1] != b" ")
events = st.lists(st.lists(lines, min_size=1, max_size=3), max_size=6)


@given(events, st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"data: ", b"data:"]), st.data())
def test_events_do_not_depend_on_where_the_bytes_are_cut(events, newline, field, data):
    wire = b"".join(
        b": keep-alive" + newline + b"".join(field + line + newline for line in event) + b"id: 7" + newline + newline
        for event in events
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    decoder = SSEDecoder()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        received += decoder.feed(wire[start:end])
    assert received == [b"\n".join(event) for event in events]


def test_an_event_is_given_only_when_it_is_complete():
    decoder = SSEDecoder()
    assert decoder.feed(b"data: one\n") == []
    assert decoder.feed(b"\ndata: two\n\ndata: thr") == [b"one", b"two"]
    assert decoder.feed(b"ee\n\n") == [b"three"]


def test_comments_and_blank_lines_alone_are_no_events():
    assert SSEDecoder().feed(b": ping\n\n\n\nevent: message\n\n") == []
