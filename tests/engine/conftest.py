"""The default model, the same model in transformers, and real prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slipstream.engine.checkpoint.checkpoint import locate, open_checkpoint
from slipstream.engine.models import loader
from slipstream.engine.scheduling import calibration
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import ChatTemplate, load_tokenizer


@pytest.fixture(scope="session")
def real_prompts() -> Callable[..., list[list[int]]]:
    """The first questions of real conversations as chat prompts in token ids, at most ``longest`` tokens each."""
    tokenizer = load_tokenizer(locate("default"))
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)

    def prompts(count: int, longest: int = 400) -> list[list[int]]:
        found: list[list[int]] = []
        with ShareGPT() as dataset:
            for _, conversation in dataset.conversations():
                question = conversation.question()
                if not question:
                    continue
                text = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
                tokens = tokenizer.encode(text, add_special_tokens=False)
                if len(tokens) <= longest:
                    found.append(tokens)
                if len(found) == count:
                    break
        return found

    return prompts


@pytest.fixture(scope="session")
def reference_model() -> Any:
    """The default model in transformers, float32.

    With the tensors as we read them, which checkpoint/test_checkpoint.py compares with those that transformers reads:
    that takes it 25 seconds.
    """
    from transformers import AutoConfig, LlamaForCausalLM

    checkpoint = open_checkpoint("default")
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors()}
    config = AutoConfig.for_model(**checkpoint.config)
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def built() -> dict[Any, Any]:
    return {}


@pytest.fixture
def quick_engines(built: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of one module that differ in how work is cut: one model for all of them, and hardly any calibration."""
    build = loader.build_model

    def build_once(checkpoint: Any, config: Any, dtype: Any, device: Any, max_model_len: int) -> Any:
        key = config.model, dtype, config.deterministic, config.kernels, config.attention_backend, max_model_len
        if key not in built:
            built[key] = build(checkpoint, config, dtype, device, max_model_len)
        return built[key]

    monkeypatch.setattr(loader, "build_model", build_once)
    monkeypatch.setattr(calibration, "PROFILE_TOKENS", (1, 16))
    monkeypatch.setattr(calibration, "PROBE_CONTEXT", 64)
