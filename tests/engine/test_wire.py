"""Frames survive any cut of the byte stream, and each end notices when the other is gone."""

import asyncio
import socket
from itertools import pairwise
from types import UnionType
from typing import get_args, get_origin

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.engine.messages import (
    AbortRequests,
    Call,
    CallReply,
    EngineStats,
    FromEngine,
    NewRequest,
    SamplingParams,
    StepOutputs,
    ToEngine,
    TokenDelta,
)
from slipstream.engine.operations import (
    AnyOperation,
    Checksums,
    DraftCosts,
    SwapDrafter,
    SwapReport,
    TargetUpdated,
    TellStepCosts,
    TensorRows,
)
from slipstream.engine.wire import ClientChannel, EngineChannel, Frames, Undecodable, frame


@given(st.lists(st.binary(max_size=300), max_size=20), st.lists(st.integers(0, 4000), max_size=30))
def test_frames_do_not_depend_on_how_the_stream_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, payloads))
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    frames = Frames()
    got = [payload for begin, end in pairwise(borders) for payload in frames.feed(stream[begin:end])]
    assert got == payloads


async def connect(received: list[FromEngine]) -> tuple[EngineChannel, ClientChannel]:
    ours, theirs = socket.socketpair()
    client = ClientChannel(received.append, lambda: None)
    await asyncio.get_running_loop().create_connection(lambda: client, sock=ours)
    return EngineChannel(theirs.detach()), client


async def test_messages_arrive_in_order_both_ways() -> None:
    received: list[FromEngine] = []
    engine, client = await connect(received)
    for number in range(300):
        client.send(AbortRequests(request_ids=[number] * 500))
    arrived = []
    while len(arrived) < 300:
        await asyncio.sleep(0)  # lets the client's end write
        arrived += engine.receive(0)
    assert [message.request_ids[0] for message in arrived] == list(range(300))  # type: ignore[union-attr]
    assert engine.receive(0) == []
    deltas = [TokenDelta(request_id=number, tokens=list(range(100))) for number in range(200)]
    outputs = StepOutputs(deltas=deltas, stats=EngineStats(step=7))
    engine.send(outputs)
    async with asyncio.timeout(300):
        while not received:
            await asyncio.sleep(0.001)
    assert received == [outputs]
    client.close()
    engine.close()


MESSAGES: list[ToEngine] = [
    NewRequest(request_id=5, prompt=[1, 2], params=SamplingParams(max_tokens=3, logit_bias={4: 1.0}), tenant="acme"),
    AbortRequests([5]),
    Call(5, SwapDrafter(2, "canary", "/heads/2")),
    Call(5, TellStepCosts()),
]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.just("é") | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("ab"), inner, max_size=3),
)


ANSWERS = (
    *(
        SwapReport(2, "canary", 1.5, 0.1),
        TargetUpdated(3, 1.5, 0.1),
        TensorRows((2, 1), b"12345678"),
        Checksums({"a": "b"}),
    ),
    *(DraftCosts({1: [0.001, 0.002]}), {1: 0.5, 8: 1.0}, True, 7, None),
)


async def test_every_answer_of_an_operation_arrives() -> None:
    operations = [each for kind in get_args(AnyOperation) for each in (get_args(kind) or [kind])]
    named = [get_args(each.__orig_bases__[0])[0] for each in operations]
    kinds = {part for each in named for part in (get_args(each) if get_origin(each) is UnionType else [each])}
    assert {get_origin(each) or each for each in kinds} == {type(answer) for answer in ANSWERS}
    received: list[FromEngine] = []
    engine, client = await connect(received)
    sent = [CallReply(number, answer) for number, answer in enumerate(ANSWERS)]
    for reply in sent:
        engine.send(reply)
    async with asyncio.timeout(300):
        while len(received) < len(sent):
            await asyncio.sleep(0.001)
    assert received == sent
    client.close()
    engine.close()


@given(st.data())
def test_what_is_no_message_is_told_from_those_around_it_and_keeps_its_id(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(MESSAGES))
    payload = msgspec.msgpack.encode(good)
    if data.draw(st.booleans()):
        fields = msgspec.msgpack.decode(payload)
        fields[data.draw(st.integers(2, len(fields) - 1))] = data.draw(ODD)
        spoilt, has_id = msgspec.msgpack.encode(fields), not isinstance(good, AbortRequests)
    else:
        spoilt, has_id = data.draw(st.binary(max_size=40)), False
    ours, theirs = socket.socketpair()
    engine = EngineChannel(theirs.detach())
    with ours:
        ours.sendall(frame(payload) + frame(spoilt) + frame(payload))
        first, odd, last = engine.receive(0)
    engine.close()
    assert first == last == good
    if isinstance(odd, Undecodable):
        assert odd.error
        assert not has_id or (odd.tag, odd.message_id) == (fields[0], 5)


async def test_the_engine_notices_that_the_api_process_is_gone() -> None:
    engine, client = await connect([])
    client.close()
    await asyncio.sleep(0.01)  # lets the transport close
    with pytest.raises(ConnectionError):
        engine.receive(300_000)
    engine.close()
