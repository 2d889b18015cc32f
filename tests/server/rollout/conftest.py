"""A server whose weights a test may change, and which it may pause or put to sleep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.server.rollout.control import Control


@pytest.fixture(scope="module")
def serving(start_local: Callable[..., Any]) -> Any:
    return start_local(max_body_bytes=64 << 20)


@pytest.fixture
def server(serving: Any, tiny_model: Path) -> Iterator[Any]:
    """With the weights of its files, awake, and with nothing to do before and after."""
    yield serving
    control = serving.service.control
    serving.run(control.resume_memory())
    serving.run(control.resume())
    if control.weight_version != "files":
        serving.run(control.update_from_disk(str(tiny_model), "files"))
    serving.wait_until_idle()


@pytest.fixture
def control(server: Any) -> Control:
    found: Control = server.service.control
    return found
