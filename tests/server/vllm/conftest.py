"""A server of its own for what pauses it, and weights for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.vllm.sending import post, say, with_weights


@pytest.fixture(scope="session")
def other_model(tiny_model: Path, policy: Any, tmp_path_factory: Any) -> Path:
    """A folder with the weights of version 1."""
    return with_weights(tiny_model, tmp_path_factory.mktemp("other") / "tiny-model", policy(1))


@pytest.fixture(scope="package")
def trained_server(start_local: Callable[..., Any]) -> Any:
    """Whose model is trained; tests leave it awake and not paused."""
    return start_local(max_model_len=8192, max_logprobs=-1)


@pytest.fixture
def trained(trained_server: Any) -> Iterator[Any]:
    yield trained_server
    assert trained_server.get("/is_paused") == (200, {"is_paused": False})
    assert trained_server.get("/is_sleeping") == (200, {"is_sleeping": False})


@pytest.fixture(scope="package")
def said(start_local: Callable[..., Any], other_model: Path, trained_server: Any) -> list[Any]:
    """What servers say with the weights of version 0 and 1."""
    found = [say(trained_server), say(start_local(model=str(other_model)))]
    assert found[0] != found[1]
    return found


@pytest.fixture
def as_it_was(trained: Any, tiny_model: Path) -> Iterator[None]:
    """Afterwards the weights of the files serve again."""
    yield
    post(trained, "/areal_update_weights", {"model_path": str(tiny_model)})
