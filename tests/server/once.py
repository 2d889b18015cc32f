"""Fixtures for what many tests of servers read and none of them changes: made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slipstream.engine.checkpoint import locate, open_checkpoint
from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.server.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def policy(tiny_model: Path) -> Callable[[int], dict[str, Tensor]]:
    """Those of a version of the tiny model, not to be changed in place; 0 are those of the files."""
    config = open_checkpoint(tiny_model).config
    made = lru_cache(4)(lambda seed: dict(dummy_tensors(config, seed)))
    return lambda seed: dict(made(seed))


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_are_read_once() -> Iterator[None]:
    """Servers of this process share the tokenizer of the same files: a quarter of what it takes to start one.

    They only read it, but that the first one drops tokens around texts which a model of these files does not have.
    """

    @lru_cache(2)
    def read(path: str, _: tuple[Any, ...]) -> Tokenizer:
        return load_tokenizer(path)

    def find(path: str | Path) -> Tokenizer:
        found = locate(path)
        stats = [(file.name, file.stat()) for file in (sorted(found.iterdir()) if found.is_dir() else [found])]
        return read(str(path), tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slipstream.server.preparing.text_model.load_tokenizer", find)
        yield
