"""The drafter that comes with Slipstream."""

import json
from pathlib import Path

import pytest
import torch

from slipstream.drafter import warm
from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.warm import __main__ as command
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import TellDraftCosts
from slipstream.engine.testing.local import LocalEngine
from slipstream.server.config import ServerConfig
from slipstream.server.preparing.text_model import load_text_model

QUESTIONS = ("How do I boil an egg?", "What is the difference between TCP and UDP?", "Write a poem about the sea.")


def test_it_fits_the_default_model_and_stays_small() -> None:
    file = warm.find(EngineConfig())
    assert file is not None and file.stat().st_size <= 16_000_000
    config, tensors = warm.read(EngineConfig())
    draft_tokens = tensors["d2t"] + torch.arange(config.draft_vocab_size)
    checkpoint = open_checkpoint("default")
    embedding = next(tensor for name, tensor in checkpoint.tensors() if name == "model.embed_tokens.weight")
    assert torch.equal(tensors[warm.OUTPUT], embedding[draft_tokens])


def test_it_drafts_well_and_changes_nothing() -> None:
    text = load_text_model("default", ServerConfig())
    assert text.template is not None
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    shown = [text.template.render(chat, add_generation_prompt=True) for chat in chats]
    prompts = [text.tokenizer.encode(prompt, add_special_tokens=False) for prompt in shown]
    params = SamplingParams(max_tokens=48, temperature=0.0)
    options = {"max_draft_tokens": 3, "speculation_policy": "fixed", "kv_cache_memory": "64MiB"}
    config = EngineConfig(drafter="warm", speculation="head", **options)
    local, plain = LocalEngine(config, make_drafters(config)), LocalEngine(EngineConfig(speculation="off", **options))
    done = local.generate(prompts, params)
    assert [c.tokens for c in done] == [c.tokens for c in plain.generate(prompts, params)]
    [stats] = local.stats.drafters
    assert 1 + stats.accepted_tokens / stats.drafts > 1.4
    assert plain.operate(TellDraftCosts()).seconds == {}


def test_what_its_draft_tokens_take_is_told() -> None:
    config = EngineConfig(drafter="warm", speculation="head", kv_cache_memory="64MiB")
    local = LocalEngine(config, make_drafters(config))
    assert local.operate(TellDraftCosts()).seconds == {}, "nobody has asked it yet"
    local.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=24, temperature=0.0))
    [seconds] = local.operate(TellDraftCosts()).seconds.values()
    assert len(seconds) == config.max_draft_tokens and 0 < seconds[0] <= seconds[-1] and seconds == sorted(seconds)


def test_another_model_has_none(tmp_path: Path) -> None:
    tiny = {"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    tiny |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    config = EngineConfig(model=str(tmp_path), load_format="dummy", drafter="warm")
    with pytest.raises(ConfigError, match=r"no drafter .* comes with Slipstream"):
        LocalEngine(config, make_drafters(config))


def test_a_file_repeats_nothing_of_the_target(tmp_path: Path) -> None:
    config, tensors = warm.read(EngineConfig())
    warm.write(tmp_path / "head.safetensors", "fingerprint", config, layout.stored(tensors), "")
    assert (tmp_path / "head.safetensors").stat().st_size < 11_000_000


@pytest.mark.parametrize("lineage", ["", "run 7"])
def test_it_begins_a_lineage_too(tmp_path: Path, lineage: str) -> None:
    config = EngineConfig(target_lineage=lineage)
    assert warm.find(config) == warm.find(EngineConfig()) is not None
    command.main("default", str(tmp_path / "registry"), lineage)
    live = Registry(tmp_path / "registry").live()
    assert live is not None and live.manifest.target == served_fingerprint(config)
    assert (f"lineage '{lineage}'" in live.manifest.target_name) == bool(lineage)
