"""What is wrong with options is said before anything that takes long is imported or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.names import check_drafters, drafter_names
from slipstream.drafter.traffic.config import TrafficConfig
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drafter": "/no/such/head"}, "/no/such/head"),
        ({"drafter": __file__}, "test_names.py"),
        ({"draft_model": "/no/such/draft"}, "/no/such/draft"),
        ({"speculation": "ngram,telepathy"}, "telepathy"),
        ({"speculation": "draft"}, "--draft-model"),
    ],
)
def test_drafters_that_there_are_not(options: dict[str, str], said: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=said):
        check_drafters(EngineConfig(**options))  # type: ignore[arg-type]


def test_drafters_that_there_are(tmp_path: Path) -> None:
    for drafter in ("warm", "cold", "random", str(tmp_path)):
        config = EngineConfig(drafter=drafter, draft_model="default")
        check_drafters(config)
        assert drafter_names(config) == ["ngram", "suffix", "head", "draft"]
    check_drafters(EngineConfig(drafter="/no/such/head", speculation="ngram"))  # which nobody reads


@pytest.mark.parametrize("option", ["kv_cache_memory", "traffic_max_bytes", "traffic_buffer"])
def test_sizes_are_read_with_the_options(option: str) -> None:
    config: Any = EngineConfig if option == "kv_cache_memory" else TrafficConfig
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} 'plenty' is not a size"):
        config(**{option: "plenty"})
    config(**{option: "1.5 GB"})
