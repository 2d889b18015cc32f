"""An EAGLE head as it drafts: weights and forward pass, made of what the target's own parts are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from slipstream.drafter.head.config import HeadConfig
from slipstream.engine.background import breathe
from slipstream.engine.models.config import cache_shape, rope_tables
from slipstream.engine.models.protocol import DecoderModel
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.weight import Weight

PIECE_ELEMS, PIECE_ROWS = 1 << 16, 64
"""Of a matrix, laid out between two moments at which steps may go first: so many elements, in whole groups of rows."""


class HeadWeights:
    """One version's weights as they are computed with; networks of several routes may share them.

    What EAGLE-1 and -2 heads lack is the target's, or not there.
    """

    def __init__(self, config: HeadConfig, target: DecoderModel) -> None:
        self._compute, self._prefix = target.compute, config.layer
        width, read = config.shapes["fc.weight"]
        self.fc = self._compute.weight(width, read, config.fc_bias)
        self.layers = self._compute.layers(config.layer_shape(target.config), 1)
        is_third = config.kind == "eagle3"
        self.output = self._compute.weight(config.draft_vocab_size, config.hidden) if is_third else target.output
        self.norm = self._compute.norm(config.hidden) if is_third else None
        self.memory_bytes = self.fc.num_bytes + self.layers[0].num_bytes
        if self.norm is not None:
            self.memory_bytes += self.output.num_bytes + self.norm.nbytes

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Lays them out; may run in another thread, while networks compute with other weights."""
        with self._compute.filling():
            _fill(self.fc, tensors["fc.weight"])
            if "fc.bias" in tensors:
                self.fc.fill_bias(tensors["fc.bias"])
            if self.norm is not None:
                _fill(self.output, tensors["lm_head.weight"])
                self.norm.copy_(tensors["norm.weight"])
            for name, tensor in tensors.items():
                if name.startswith(self._prefix):
                    for row, part in _pieces(tensor):
                        self.layers[0].fill(name.removeprefix(self._prefix), part, row)


def _fill(weight: Weight, tensor: Tensor) -> None:
    for row, part in _pieces(tensor):
        weight.fill(part, row)


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First rows and rows; steps go on between them."""
    if tensor.dim() < 2:
        yield 0, tensor
        return
    rows = max(PIECE_ELEMS // tensor.shape[1] // PIECE_ROWS, 1) * PIECE_ROWS
    for number, part in enumerate(torch.split(tensor, rows)):
        breathe()
        yield number * rows, part


class HeadNetwork:
    """The head's layer over keys and values of its own, with the target's embeddings."""

    def __init__(
        self, config: HeadConfig, target: DecoderModel, num_blocks: int, block_size: int, max_length: int
    ) -> None:
        """The drafter has refused heads for other models before. ``max_length`` of sequences, in tokens."""
        decoder, compute = config.as_decoder(target.config), target.compute
        self._target, self._is_third = target, config.kind == "eagle3"
        self._stack = compute.stack(
            config.layer_shape(target.config), (0,), target.embedding, rope_tables(decoder, max_length)
        )
        self._weights: HeadWeights
        self.cache: PagedKVCache = compute.cache(cache_shape(decoder.shape, block_size, target.formats.kv), num_blocks)
        """The head's keys and values."""

    def use(self, weights: HeadWeights) -> None:
        """Computes with these from now on; called before the first computation, and between two."""
        self._weights = weights
        self._stack.use(weights.layers, weights.norm, weights.output)

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [n, taps, hidden] as they wait for their tokens, [n, hidden] float32."""
        fused = self._weights.fc if self._is_third else self._target.final_norm
        return fused(features.flatten(1)).float()

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden] float32 from the tokens of the batch and what came before each of them, ``hidden``.

        Position p holds token p + 1 and the features of position p (or the head's own output there), and predicts
        token p + 2. Writes the head's keys and values; may overwrite ``hidden``.
        """
        if not self._is_third:
            embedding = self._target.embedding.rows(torch.from_numpy(batch.token_ids).to(hidden.device))
            hidden = self._weights.fc(torch.cat((embedding, hidden.to(embedding.dtype)), dim=-1))
        return self._stack.forward(batch, self.cache, hidden).hidden.float()

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary] float32; valid until the next call."""
        return self._stack.logits(hidden)
