"""A process that speaks the wire of an engine, without a model, and misbehaves as its last argument says."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import msgspec

from slipstream.engine.messages import (
    AbortRequests,
    Call,
    CallReply,
    DrafterStats,
    EngineFailed,
    EngineReady,
    EngineStats,
    NewRequest,
    StepOutputs,
    TokenDelta,
)
from slipstream.engine.operations import CancelTargetUpdate, Pause
from slipstream.engine.wire import EngineChannel, frame

SHAPE = {"vocab_size": 9, "max_model_len": 9, "block_size": 16, "num_blocks": 9, "weights_bytes": 0}
READY = EngineReady(
    model_type="odd",
    weights="bfloat16",
    weights_because="it is odd",
    dtype="float32",
    kv_cache_dtype="float32",
    device="cpu",
    kernels="none",
    kv_cache_bytes=0,
    load_seconds=0.0,
    **SHAPE,
)


def main(descriptor: str, _: str, how: str) -> int:
    channel = EngineChannel(int(descriptor))
    match how:
        case "refuses":
            channel.send(EngineFailed("the model is gone", user_error=True))
            return 2
        case "dies early":
            os._exit(7)  # with its channel, not a moment later, in which it would be killed
        case "loads for ever":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
    channel.send(READY)
    requests, is_paused, version = 0, False, 0
    while True:
        for message in channel.receive(20):
            match message:
                case NewRequest(request_id=request_id) if how != "hangs":
                    requests += 1
                    channel.send(StepOutputs([TokenDelta(request_id=request_id, tokens=[1])], EngineStats()))
                case Call(call_id, Pause() | CancelTargetUpdate() as operation):  # as if an update had been finished
                    is_paused = is_paused or isinstance(operation, Pause)
                    version = getattr(operation, "version", version)
                    channel.send(CallReply(call_id))
                case Call(call_id=call_id):
                    misbehave(channel, how)
                    channel.send(CallReply(call_id, {os.getpid(): 0.0}))
                case AbortRequests():
                    pass
        drafter = DrafterStats("head", draft_tokens=requests, accepted_per_position=[requests], routes={"": 1})
        stats = EngineStats(generation_tokens=requests, num_running=requests, drafters=[drafter])
        stats = msgspec.structs.replace(stats, is_paused=is_paused, target_version=version)
        channel.send(StepOutputs([], stats))


def misbehave(channel: EngineChannel, how: str) -> None:
    match how:
        case "sends rubbish":
            channel._socket.sendall(frame(b"\xc1 no message"))
        case "sends another type":
            channel._socket.sendall(frame(msgspec.msgpack.encode(["step", "no list", 3])))
        case "hangs up":
            channel._socket.shutdown(socket.SHUT_RDWR)
            time.sleep(600)
        case "fails and lingers":
            channel.send(EngineFailed("the engine failed: on purpose"))
            time.sleep(600)
        case "hangs":
            time.sleep(600)
        case "answers twice":
            channel.send(CallReply(123456))
        case "kills itself":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
