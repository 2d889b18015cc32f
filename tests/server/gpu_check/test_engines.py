"""Engines of a check, one after the other in one process."""

from __future__ import annotations

import time
import weakref
from pathlib import Path

from slipstream.engine.messages import SamplingParams
from slipstream.server.gpu_check import models
from slipstream.server.gpu_check.context import Context, Options
from slipstream.server.gpu_check.engines import config, engine


def test_an_engine_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Else the next one finds no room on a GPU, which the one before had all of."""
    options = Options(tmp_path, 60.0, True, (), None, ())
    context = Context(options, lambda told: None, time.monotonic() + 60, {}, tmp_path)
    path = models.folder(context, "1B", models.shape(context, "1B"))
    with engine(config(context, path, load_format="dummy", speculation="head", drafter="random")) as local:
        gone = [weakref.ref(local.engine.loaded.model), *map(weakref.ref, local.engine.runner.caches)]
        [answer] = local.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    assert len(answer.tokens) == 3 and local.completions and not any(each() for each in gone)
