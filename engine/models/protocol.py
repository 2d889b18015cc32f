"""What the runner asks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from slipstream.engine.models.config import ModelShape
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache


class CausalModel(Protocol):
    """Weights and their forward pass. Every call runs over a ragged batch and writes keys and values to the cache."""

    shape: ModelShape
    dtype: torch.dtype
    kernels: str
    """Name of what runs the hot path, for logs and metrics."""

    switch_length: int
    """Sequences longer than this are computed in another way from their first position on, so that what the cache holds
    of them from before cannot be used (see ``rope``); 0 for no such length."""

    features: Tensor
    """After a forward pass: the inputs of the tapped layers, [num_tokens, taps, hidden]; valid until the next one."""

    def tap(self, layers: tuple[int, ...]) -> None:
        """From now on, keep the inputs of these layers; the number of layers stands for the output of the last.

        Raises ConfigError where that is not possible.
        """

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies weights in, by their Hugging Face names, in place; raises ModelError for a misfit or a gap."""

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """A cache in the layout this model reads."""

    def forward(self, batch: RaggedBatch, cache: PagedKVCache) -> Tensor:
        """Hidden states [num_tokens, hidden], as ``logits`` takes them."""

    def logits(self, hidden: Tensor, rows: Int32) -> Tensor:
        """Logits [len(rows), vocab_size] float32 of some rows of hidden; valid until the next call."""
