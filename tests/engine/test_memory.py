"""What says that there is no memory is told in a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.thread import start_thread


def too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def none_left() -> None:
    raise MemoryError


def none_on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("allocate", "said"),
    [
        (too_much, "allocate 1152921504606846976 bytes"),
        (none_left, "none is left"),
        (none_on_the_gpu, "Tried to allocate 2.00 GiB"),
    ],
)
async def test_an_engine_without_memory_says_so_and_shows_no_trace(
    allocate: Callable[[], None], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def drafters(_: EngineConfig) -> tuple[()]:
        allocate()
        return ()

    with pytest.raises(ModelError, match=f"the model does not fit into memory.*{said}"):
        await start_thread(EngineConfig(), drafters)
    assert "Traceback" not in capfd.readouterr().err
