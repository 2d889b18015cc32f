"""A process that reads and tokenizes what would hold up the event loop, or what may never end.

Run as ``python -m slipstream.server.preparing.text_worker DESCRIPTOR``: an inherited socket. The first message says
which model it is for; then come jobs, each a name and a body, which are answered. A job that takes more processor time
or memory than it may ends the process; the server starts another when it needs one.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from slipstream.engine import memory
from slipstream.server.errors import ApiError
from slipstream.server.jobs import JOBS, require_small
from slipstream.server.preparing.prepared import Limits, Prepared, RunElsewhereError
from slipstream.server.preparing.text_model import load_text_model
from slipstream.server.telemetry.log import set_up_logging

LENGTH_BYTES = 8
OUT_OF_MEMORY = 77
"""Exit status."""
PANIC = "PanicException"
"""What libraries in Rust raise, besides aborting, when there is no memory for an object."""
SPARE_BYTES = 128 * 2**20
"""Memory that any job may have, however small its body."""
BYTES_PER_BYTE = 20
"""Memory that a job may have for each byte of its body."""


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    memory.share_arena()  # a grammar is compiled in threads, whose reserves would be taken for what it needs
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    model, config, limits, cpu_s = pickle.loads(receive(connection))
    logging.disable(logging.WARNING)  # the server has said it
    text = load_text_model(model, config)
    text.fit(limits.vocab_size)
    logging.disable(logging.NOTSET)
    set_up_logging(config.log_level)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a large body would go over all that has been read of it
    while True:
        job, raw = receive(connection).decode(), receive(connection)
        with_limits(len(raw), cpu_s)
        try:
            reply = pickle.dumps(run(job, text, limits, raw))
        except BaseException as error:
            if isinstance(error, MemoryError) or type(error).__name__ == PANIC:
                os._exit(OUT_OF_MEMORY)
            raise
        without_limits()
        connection.sendall(len(reply).to_bytes(LENGTH_BYTES, "little") + reply)
        del raw, reply
        memory.trim()


def receive(connection: socket.socket) -> bytes:
    """The next message; ends the process when the server is gone."""
    length = int.from_bytes(receive_exactly(connection, LENGTH_BYTES), "little")
    return receive_exactly(connection, length)


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            sys.exit(0)
        view = view[count:]
    view.release()
    return bytes(data)


def run(job: str, text: Any, limits: Limits, raw: bytes) -> Any:
    """What the job gives, or the exception with which it ends."""
    try:
        result = JOBS[job](text, limits, raw)
        if isinstance(result, Prepared):
            require_small(result.body)
            return result.packed()
        return result
    except (ApiError, RunElsewhereError) as error:
        return error.with_traceback(None)


def with_limits(body_bytes: int, cpu_s: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    most = mapped + SPARE_BYTES + BYTES_PER_BYTE * body_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def without_limits() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
