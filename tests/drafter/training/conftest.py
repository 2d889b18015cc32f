"""A small target and heads for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from slipstream.drafter.head import layout
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example
from slipstream.engine.models.config import DecoderConfig, decoder_config

VOCAB, HIDDEN = 96, 64
TARGET = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
MakeHead = Callable[..., TrainableHead]
MakeExample = Callable[..., Example]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These sizes are not worth a second one, least of all on a loaded machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target() -> DecoderConfig:
    return decoder_config(TARGET)


@pytest.fixture(scope="session")
def embedding() -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_head(target: DecoderConfig, embedding: Tensor) -> MakeHead:
    def make(
        seed: int = 0, vocab: int = 48, dtype: torch.dtype = torch.float32, backwards: bool = False
    ) -> TrainableHead:
        config = layout.config_for(target, vocab)
        tensors = layout.random_tensors(config, seed)
        draft = torch.arange(vocab) * 2
        tensors["d2t"] = draft - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, draft, True)
        tensors = {name: tensor * 4 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        if backwards:
            tensors = dict(reversed(tensors.items()))
        return TrainableHead(config, target, embedding, tensors, dtype)

    return make


@pytest.fixture(scope="session")
def make_example() -> MakeExample:
    def make(length: int = 30, num_prompt: int = 6, start: int = 0, seed: int = 0) -> Example:
        rng = np.random.default_rng((seed, length))
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        # Features tell the token after the next one, so that there is something to learn.
        features = torch.randn(VOCAB, 3, HIDDEN, generator=torch.Generator().manual_seed(2))
        shown = np.concatenate((tokens[2:], tokens[:1]))[start : length - 1]
        return Example(tokens, num_prompt, start, features[torch.from_numpy(shown).long()])

    return make
