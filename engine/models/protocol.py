"""What the runner asks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from slipstream.engine.checkpoint.checkpoint import Checkpoint
from slipstream.engine.models.config import DecoderConfig, ModelShape
from slipstream.engine.models.weights import Rows, Weights
from slipstream.kernels.adapter import Adapter
from slipstream.kernels.batch import Int32, RaggedBatch
from slipstream.kernels.compute import Compute, Formats
from slipstream.kernels.compute import Forward as Forward
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.weight import Weight


class CausalModel(Protocol):
    """Weights and their forward pass. Every call runs over a ragged batch and writes keys and values to the cache."""

    shape: ModelShape
    formats: Formats
    kernels: str
    """Name of what runs the hot path, for logs and metrics."""
    takes_latest: bool
    """Whether it reads ``RaggedBatch.latest``."""

    switch_length: int
    """Sequences longer than this are computed in another way from their first position on, so that what the cache holds
    of them from before cannot be used (see ``rope``); 0 for no such length."""

    @property
    def decoder(self) -> DecoderModel | None:
        """The same model as one whose layers can be looked into; None where they cannot."""

    @property
    def weights(self) -> Weights:
        """Those that it computes with; another object with other weights."""

    def new_weights(self) -> Weights:
        """Weights to be filled that the model does not use yet."""

    def use(self, weights: Weights) -> None:
        """Computes with these, of its own making and complete, from now on; called between two forward passes."""

    def forget(self) -> None:
        """Holds no weights from now on, until it is told to use some; nothing is computed meanwhile."""

    def tensors(self, checkpoint: Checkpoint) -> Iterable[tuple[str, Rows]]:
        """What a checkpoint holds, to be filled in; raises ModelError if it is not of a model like this one."""

    @property
    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By the names of its weights, also while it has none."""

    def adapter(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        """What an adapter adds: A [rank, k] and B [n, rank] by the names of weights.

        Raises ModelError for weights that can have none. May be called while steps run.
        """

    def use_adapters(self, adapters: Sequence[Adapter | None]) -> None:
        """See ``Stack.use_adapters``; called between two forward passes."""

    def new_cache(self, num_blocks: int, block_size: int) -> PagedKVCache:
        """A cache in the layout this model reads."""

    def forward(self, batch: RaggedBatch, cache: PagedKVCache, taps: tuple[int, ...] = ()) -> Forward:
        """Runs the batch. ``taps``, ascending: layers whose inputs are wanted; their number for the last one's output.

        Only for models with a ``decoder`` may there be taps.
        """

    def logits(self, hidden: Tensor, rows: Int32 | Tensor) -> Tensor:
        """Logits [len(rows), vocab_size] float32 of some rows of hidden; valid until the next call. See ``Stack``."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[n, hidden]: what the output matrix reads of some rows of hidden."""


class DecoderModel(CausalModel, Protocol):
    """A model of decoder layers that can be looked into, which drafters share parts of, and make more of the kind."""

    config: DecoderConfig
    compute: Compute
    """What its parts were made by; those of a drafter that works with them are made by the same."""

    @property
    def embedding(self) -> Weight:
        """Token embeddings [vocab_size, hidden]; another object with other weights."""

    @property
    def output(self) -> Weight:
        """The output matrix [vocab_size, hidden]; another object with other weights."""
