"""Decoders inside models that see: what a file leaves out is as in transformers, what is of the whole is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slipstream.engine.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.text_part import OUTER
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.loader import load_model
from slipstream.engine.testing.local import TINY_LLAMA


def opened(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder).config


@pytest.mark.parametrize("kind", OUTER)
def test_what_a_decoder_does_not_state_is_as_in_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig

    theirs: Any = AutoConfig.for_model(kind, text_config={"num_hidden_layers": 2}).get_text_config()
    ours = decoder_config(opened(tmp_path, {"model_type": kind, "text_config": {"num_hidden_layers": 2}}))
    shape = ours.shape
    assert (shape.num_layers, shape.vocab_size, ours.hidden) == (2, theirs.vocab_size, theirs.hidden_size)
    assert (ours.heads, shape.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert shape.head_dim == (getattr(theirs, "head_dim", None) or ours.hidden // ours.heads)
    assert (ours.intermediate, ours.norm_eps) == (theirs.intermediate_size, theirs.rms_norm_eps)
    assert shape.max_positions == theirs.max_position_embeddings
    rope = theirs.rope_parameters
    assert ours.rope["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]


UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}


@pytest.mark.parametrize(("whole", "part", "tied"), [({}, {}, True), (UNTIED, {}, False), (UNTIED, TIED, True)])
def test_ties_are_said_by_the_whole_or_the_part(
    tmp_path: Path, whole: dict[str, Any], part: dict[str, Any], tied: bool
) -> None:
    config = {"model_type": "mistral3", "text_config": TINY_LLAMA | {"model_type": "mistral"} | part} | whole
    assert opened(tmp_path, config)["tie_word_embeddings"] is tied


def test_a_decoder_of_a_quantised_model_is_refused_as_such(tmp_path: Path) -> None:
    opened(tmp_path, {"model_type": "llava", "text_config": TINY_LLAMA, "quantization_config": {"quant_method": "hqq"}})
    with pytest.raises(ModelError, match="quantised \\(hqq\\)"):
        load_model(EngineConfig(model=str(tmp_path), load_format="dummy"))


def test_a_decoder_of_a_family_that_does_not_run_natively_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, {"model_type": "llava", "text_config": TINY_LLAMA | {"model_type": "granite"}})
    with pytest.raises(ModelError, match="no class for generating text with 'llava' models alone"):
        load_model(EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_memory="2MiB"))
