"""Ports for what tests start."""

from __future__ import annotations

import contextlib
import os
import random
import socket

PROCESSES = 16
"""Most that run tests side by side. Each has ports of its own: what is free here may be about to be taken there."""
OWN = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % PROCESSES
GIVEN: set[int] = set()


def free_port() -> int:
    """Below those that the system gives to connections and to who asks for any, which are many while tests run."""
    while True:
        port = random.SystemRandom().randrange(10_000 + OWN, 32_000, PROCESSES)
        if port in GIVEN:
            continue
        GIVEN.add(port)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
