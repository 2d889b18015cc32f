"""Tiny models of any family, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch


class TinyModel:
    """A model folder with random weights, and what transformers' own code generates with it in float32."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """``config`` is written as it is; a model that transformers cannot make gets a folder without weights."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        self.folder = folder
        self.module: Any = None
        torch.manual_seed(3)
        with suppress(ValueError):
            settings = AutoConfig.for_model(**json.loads(json.dumps(config)))
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            try:
                made = AutoModelForCausalLM.from_config(settings, **options)
            except ValueError:  # what sees, too, is in another list
                made = AutoModelForImageTextToText.from_config(settings, **options)
            self.module = made.eval()
        if self.module is not None:
            for name, parameter in self.module.named_parameters():
                # Biases and norms too, so that none can be forgotten; large, so that texts differ from each other.
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, *((0.0, 0.1) if name.endswith("bias") else (0.5, 0.3)))
                else:
                    torch.nn.init.normal_(parameter, 0, 2.0 / parameter.shape[-1] ** 0.5)
            for module in self.module.modules():
                if isinstance(module, torch.nn.Embedding):  # small, or tied models repeat their last token for ever
                    torch.nn.init.normal_(module.weight, 0, 0.05)
            self.module.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The most likely tokens after a prompt."""
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            found: list[int] = self.module.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        return found


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[[dict[str, Any]], TinyModel]:
    return lambda config: TinyModel(tmp_path, config)
