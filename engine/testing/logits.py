"""What a model computes of a prompt, without an engine, for tests that compare forms of the same weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slipstream.engine.config import EngineConfig
from slipstream.engine.models.loader import load_model
from slipstream.kernels.batch import make_batch

TOKENS, BLOCK = 48, 16


@torch.inference_mode()
def prompt_logits(config: EngineConfig, vocab: int = 32) -> Tensor:
    """[48, vocabulary]: those of each position of a prompt of 48 random tokens below ``vocab``."""
    model, ids = load_model(config).model, np.random.default_rng(1).integers(0, vocab, TOKENS)
    counts, table = np.array([TOKENS], np.int32), np.arange(TOKENS // BLOCK, dtype=np.int32)[None]
    batch = make_batch(ids.astype(np.int32), counts, counts, table, np.zeros(1, np.int32), BLOCK)
    hidden = model.forward(batch, model.new_cache(TOKENS // BLOCK, BLOCK)).hidden
    return model.logits(hidden, np.arange(TOKENS, dtype=np.int32)).clone()
