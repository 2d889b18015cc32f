"""What is read of a stream, and when."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.handle import RequestStream
from slipstream.engine.messages import TokenDelta


def stream() -> RequestStream:
    engine: Any = None
    return RequestStream(engine, 1)


def delta(tokens: list[int], finish_reason: Any = None) -> TokenDelta:
    return TokenDelta(request_id=1, tokens=tokens, finish_reason=finish_reason)


@given(sizes=st.lists(st.integers(0, 4), max_size=20), least=st.integers(0, 9), reads=st.data())
async def test_reads_have_the_tokens_asked_for_and_lose_none(sizes: list[int], least: int, reads: Any) -> None:
    """Whoever reads slowly gets more at once, never less; the last delta is waited for by nobody."""
    source = stream()
    tokens = list(range(sum(sizes)))
    found: list[int] = []
    sent = 0
    reading: asyncio.Task[list[TokenDelta]] | None = None
    for size in sizes:
        if reading is None and reads.draw(st.booleans()):
            reading = asyncio.create_task(source.next(least))
        source.put(delta(tokens[sent : sent + size]))
        sent += size
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if reading is not None and reading.done():
            part = [token for read in reading.result() for token in read.tokens]
            assert len(part) >= least
            found += part
            reading = None
        assert reading is None or sent - len(found) < least
    source.put(delta([], "stop"))
    if reading is None:
        reading = asyncio.create_task(source.next(least))
    last = await reading
    assert last[-1].finish_reason == "stop" and await source.next(least) == []
    assert [*found, *(token for read in last for token in read.tokens)] == tokens
