"""An EAGLE head as it drafts: weights and forward pass, made of what the target's own parts are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slipstream.drafter.head.config import OUTPUT, HeadConfig
from slipstream.engine.background import breathe
from slipstream.engine.models.config import cache_shape, rope_tables
from slipstream.engine.models.protocol import DecoderModel
from slipstream.engine.models.weights import pieces
from slipstream.kernels.batch import RaggedBatch
from slipstream.kernels.compute import ChainInputs, Chains
from slipstream.kernels.host_chains import HostChains, MadeChains
from slipstream.kernels.kv_cache import PagedKVCache
from slipstream.kernels.readback import sent
from slipstream.kernels.weight import Weight

ROWS_AT_ONCE = 128
"""Rows of an output matrix that are compared and copied between two moments at which steps may go first."""


class HeadWeights:
    """One version's weights as they are computed with; networks of several routes may share them."""

    def __init__(self, config: HeadConfig, target: DecoderModel) -> None:
        self._target, self._compute, self._prefix = target, target.compute.for_drafts, config.layer
        width, read = config.shapes["fc.weight"]
        self.fc = self._compute.weight(width, read, config.fc_bias)
        self.layers = self._compute.layers(config.layer_shape(target.config), 1)
        is_third = config.kind == "eagle3"
        self.output = self._compute.weight(config.draft_vocab_size, config.hidden) if is_third else None
        """EAGLE-1 and -2 heads draft with that of the target."""
        self.follows = False
        """Whether the output matrix holds rows of the target's, which training leaves."""
        self.norm = self._compute.norm(config.hidden) if is_third else None
        self.memory_bytes = self.fc.num_bytes + self.layers[0].num_bytes
        if self.output is not None and self.norm is not None:
            self.memory_bytes += self.output.num_bytes + self.norm.nbytes

    def fill(self, tensors: Mapping[str, Tensor], draft_tokens: Tensor, alike: HeadWeights | None = None) -> None:
        """Lays them out; may run in another thread, while networks compute with other weights.

        Without an output matrix among them, it becomes the rows ``draft_tokens`` of the target's. Weights that have
        just these (``alike``) share theirs: to copy them is two thirds of the work.
        """
        with self._compute.filling():
            _fill(self.fc, tensors["fc.weight"])
            if "fc.bias" in tensors:
                self.fc.fill_bias(tensors["fc.bias"])
            if self.output is not None and self.norm is not None:
                self._fill_output(self.output, tensors.get(OUTPUT), draft_tokens, alike)
                self.norm.copy_(tensors["norm.weight"])
            for name, tensor in tensors.items():
                if name.startswith(self._prefix):
                    for row, part in pieces(tensor):
                        self.layers[0].fill(name.removeprefix(self._prefix), part, row)

    def _fill_output(
        self, before: Weight, matrix: Tensor | None, draft_tokens: Tensor, alike: HeadWeights | None
    ) -> None:
        if matrix is None and alike is not None:
            self.output, self.follows = alike.output, True
            return
        # Not over what was there, which others may share.
        self.output = None
        output = self._compute.weight(before.n, before.k)
        if matrix is None:
            _copy_rows(output, self._target.output, draft_tokens)
        else:
            _fill(output, matrix)
        self.output = output
        self.follows = matrix is None or _are_copies(
            matrix, self._target.output, draft_tokens, self._compute.formats.compute
        )

    def output_from(self, rows: Tensor, after: Weight) -> Weight | None:
        """The head's output matrix for a target whose output matrix is ``after`` from now on.

        ``rows`` [draft vocabulary] of these are what the head proposes. Only where it holds copies of them: None for a
        head that does not, or has none of its own.
        """
        if self.output is None or not self.follows:
            return None
        output = self._compute.weight(self.output.n, self.output.k)
        with self._compute.filling():
            _copy_rows(output, after, rows)
        return output


def _copy_rows(output: Weight, source: Weight, rows: Tensor) -> None:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        breathe()
        output.fill(source.rows(rows[first : first + ROWS_AT_ONCE]), first)


def _are_copies(matrix: Tensor, of: Weight, rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether its rows are these, in the format of numbers that are not packed."""
    for first in range(0, len(rows), ROWS_AT_ONCE):
        breathe()
        some = of.rows(rows[first : first + ROWS_AT_ONCE]).to(dtype)
        if not torch.equal(matrix[first : first + ROWS_AT_ONCE].to(some.device, dtype), some):
            return False
    return True


def _fill(weight: Weight, tensor: Tensor) -> None:
    for row, part in pieces(tensor):
        weight.fill(part, row)


class HeadNetwork:
    """The head's layer over keys and values of its own, with the target's embeddings."""

    def __init__(
        self, config: HeadConfig, target: DecoderModel, num_blocks: int, block_size: int, max_length: int
    ) -> None:
        """The drafter has refused heads for other models before. ``max_length`` of sequences, in tokens."""
        decoder, compute = config.as_decoder(target.config), target.compute.for_drafts
        self._target, self._is_third = target, config.kind == "eagle3"
        self._stack = compute.stack(config.layer_shape(target.config), (0,), rope_tables(decoder, max_length))
        self._weights: HeadWeights
        self.cache: PagedKVCache = compute.cache(cache_shape(decoder.shape, block_size, target.formats), num_blocks)
        """The head's keys and values."""

    def use(self, weights: HeadWeights) -> None:
        """Computes with these, and what the target uses now; called before the first computation, and between two."""
        self._weights = weights
        output = self._target.output if weights.output is None else weights.output
        self._stack.use(self._target.embedding, weights.layers, weights.norm, output)

    def forget(self) -> None:
        """Keeps nothing of the target's from being freed, until ``use``."""
        self._stack.forget()

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features [n, taps, hidden] as the layer reads them, [n, hidden] float32."""
        fused = self._weights.fc if self._is_third else self._target.final_norm
        return fused(features.flatten(1)).float()

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """[num_tokens, hidden] float32 from the tokens of the batch and what came before each of them, ``hidden``; of
        the tokens alone that the batch's column names, if it has one.

        Position p holds token p + 1 and the features of position p (or the head's own output there), and predicts
        token p + 2. Writes the head's keys and values; may overwrite ``hidden``.
        """
        if not self._is_third:
            embedding = self._target.embedding.rows(sent(batch.token_ids, hidden.device))
            hidden = self._weights.fc(torch.cat((embedding, hidden.to(embedding.dtype)), dim=-1))
        done = self._stack.forward(batch, self.cache, hidden)
        return (done.hidden[done.columns[0]] if batch.columns else done.hidden).float()

    @property
    def makes_chains(self) -> bool:
        """Whether ``chains`` may make some."""
        return self._is_third and self._target.compute.for_drafts.makes_chains

    def chains(self, given: ChainInputs) -> Chains | None:
        """See ``Stack.chains``; ``forward`` and ``logits`` for several draft tokens at once."""
        return self._stack.chains(given, self.cache)

    def draft(self, asked: HostChains, hidden: Tensor) -> MadeChains | None:
        """See ``Stack.draft``; ``logits`` and ``forward`` in turn, in one call."""
        return self._stack.draft(asked, self.cache, hidden) if self._is_third else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, draft vocabulary] float32; valid until the next call."""
        return self._stack.logits(hidden)
