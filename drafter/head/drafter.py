"""Drafts with an EAGLE-3 head: one small layer that continues the target's own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.head.network import HeadNetwork, make_network
from slipstream.engine.errors import ConfigError, ModelError
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.models.native_decoder import NativeDecoder
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.torch_decoder import TorchDecoder
from slipstream.engine.speculation.protocol import Computed, Drafter, DraftHost, DraftRow, Proposal
from slipstream.kernels.batch import Int32, make_batch

MOST_PENDING = 512
"""Positions per request that wait for the head while nobody asks it; older ones are left out."""
EVIDENCE_BORDERS = (0.15, 0.3, 0.5, 0.7, 0.9)
"""Least probability of the first guess for each level of evidence but the lowest."""

Load = Callable[[DecoderConfig], tuple[HeadConfig, Mapping[str, Tensor]]]
"""Reads or makes a head for a target."""


@dataclass(slots=True)
class _Pending:
    """Features that the head has not seen: positions start, start + 1, …, as the head reads them."""

    start: int
    fused: Tensor  # [positions, hidden]


class HeadDrafter(Drafter):
    """The head's keys and values lie in the same blocks as the target's, so a cached prefix is cached for both.

    Position p of the head holds the features of position p and token p + 1. The features of accepted tokens are the
    target's: what the head wrote while drafting is overwritten when it catches up. Where the head was not asked for a
    while, or a cached block was written with another next token, its keys and values are older or missing; that costs
    acceptance, never correctness.
    """

    name = "head"
    num_evidence = len(EVIDENCE_BORDERS) + 1

    def __init__(self, load: Load, stop_below: float = 0.05) -> None:
        """A draft ends where the probability that all of it is right falls below ``stop_below``.

        This is the threshold rule of SpecDec++ (Huang et al. 2024) with the head's own probabilities.
        """
        self._load = load
        self._stop_below = stop_below
        self._config: HeadConfig
        self._tensors: Mapping[str, Tensor]
        self._network: HeadNetwork
        self._host: DraftHost
        self._to_target: Int32

    def taps(self, model: CausalModel) -> tuple[int, ...]:
        if not isinstance(model, NativeDecoder | TorchDecoder):
            raise ConfigError(
                f"a head reads hidden states, which {model.shape.model_type} models, run through transformers, do not "
                "show; use --speculation ngram,suffix"
            )
        self._config, self._tensors = self._load(model.config)
        config, target = self._config, model.config
        for what, ours, theirs in (
            ("hidden size", config.hidden, target.hidden),
            ("vocabulary", config.vocab_size, target.shape.vocab_size),
        ):
            if ours != theirs:
                raise ModelError(f"the drafter does not fit the model: its {what} is {ours}, the model's {theirs}")
        return config.taps

    def attach(self, host: DraftHost) -> None:
        config = self._config
        self._host = host
        self._network = make_network(config, host)
        self._network.load(self._tensors)
        offsets = self._tensors.get("d2t", torch.zeros(config.draft_vocab_size))
        self._to_target = (offsets.long() + torch.arange(config.draft_vocab_size)).numpy().astype(np.int32)
        self._tensors = {}

    def observe(self, computed: Sequence[Computed]) -> None:
        if not computed:
            return
        fused = self._network.fuse(torch.cat([entry.features for entry in computed]))
        parts = torch.split(fused, [len(entry.features) for entry in computed])
        for entry, rows in zip(computed, parts, strict=True):
            pending = entry.row.memory.get(self.name)
            if isinstance(pending, _Pending) and pending.start + len(pending.fused) == entry.start:
                rows = torch.cat((pending.fused, rows))
                entry_start = pending.start
            else:
                entry_start = entry.start
            left_out = max(len(rows) - MOST_PENDING, 0)
            entry.row.memory[self.name] = _Pending(entry_start + left_out, rows[left_out:])

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        proposals: list[Proposal | None] = [None] * len(rows)
        live = [i for i, row in enumerate(rows) if self._is_caught_up(row)]
        if not live:
            return proposals
        hidden = self._catch_up([rows[i] for i in live])
        tokens: dict[int, list[int]] = {i: [] for i in live}
        first: dict[int, float] = {}
        chance = np.ones(len(live))
        for depth in range(max(rows[i].most for i in live)):
            likely, guesses = self._most_likely(hidden)
            chance = chance * likely
            for i, guess, probability in zip(live, guesses, likely, strict=True):
                tokens[i].append(int(guess))
                first.setdefault(i, float(probability))
            goes_on = [
                at
                for at, i in enumerate(live)
                if depth + 1 < rows[i].most
                and rows[i].length + depth <= rows[i].mapped
                and chance[at] >= self._stop_below
            ]
            if not goes_on:
                break
            live, chance = [live[at] for at in goes_on], chance[goes_on]
            ends = np.array([rows[i].length + depth for i in live], np.int32)
            hidden = self._step(
                [rows[i] for i in live], guesses[goes_on], np.ones(len(live), np.int32), ends, hidden[goes_on]
            )
        for i, guessed in tokens.items():
            proposals[i] = Proposal(guessed, sum(first[i] >= border for border in EVIDENCE_BORDERS))
        return proposals

    def _is_caught_up(self, row: DraftRow) -> bool:
        """Whether the features up to the last but one token, after which the next guess comes, are at hand."""
        pending = row.memory.get(self.name)
        return isinstance(pending, _Pending) and pending.start + len(pending.fused) == row.length - 1

    def _catch_up(self, rows: Sequence[DraftRow]) -> Tensor:
        """Shows the head what the target computed since it was asked last; its output at the last positions."""
        pendings = []
        for row in rows:
            pending = row.memory.pop(self.name)
            assert isinstance(pending, _Pending)
            pendings.append(pending)
        ids = np.concatenate([row.known[pending.start + 1 :] for row, pending in zip(rows, pendings, strict=True)])
        counts = np.array([len(pending.fused) for pending in pendings], np.int32)
        ends = np.array([row.length - 1 for row in rows], np.int32)
        hidden = self._step(rows, ids, counts, ends, torch.cat([pending.fused for pending in pendings]))
        return hidden[np.cumsum(counts) - 1]

    def _step(self, rows: Sequence[DraftRow], ids: Int32, counts: Int32, ends: Int32, hidden: Tensor) -> Tensor:
        slots = np.array([row.slot for row in rows], np.int32)
        batch = make_batch(ids, counts, ends, self._host.block_tables, slots, self._host.block_size)
        return self._network.forward(batch, hidden)

    def _most_likely(self, hidden: Tensor) -> tuple[np.ndarray, Int32]:
        """Probability and token of the best guess of each row."""
        logits = self._network.logits(hidden)
        best = logits.max(dim=-1)
        likely = (best.values - logits.logsumexp(-1)).exp()
        return likely.double().cpu().numpy(), self._to_target[best.indices.cpu().numpy()]
