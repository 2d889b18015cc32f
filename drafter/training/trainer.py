"""Trains a head on packs of texts, and can be stopped and resumed at any step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipstream.drafter.training import candidates, losses
from slipstream.drafter.training.muon import Muon
from slipstream.drafter.training.network import TrainableHead
from slipstream.drafter.training.packing import Example, Pack, pack
from slipstream.drafter.training.threads import Threads

MOST_PARTS = 1024
"""Parts of one step that draw candidates of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    loss: losses.LossName = "ce"
    steps: int = 3
    """Draft tokens in a row that are learned, each where those before it are right: what follows a wrong one is never
    looked at. So most of the time goes to first draft tokens as long as few are right."""
    step_decay: float = 0.8
    """Weight of each draft token relative to the one before it."""
    learning_rate: float = 2e-3
    """Rate for matrices, which Muon updates (Jordan et al. 2024), scaled to AdamW's size; vectors get a tenth."""
    first_rate: float = 1e-2
    """The rate with which a head begins that has learned nothing yet, and has far to go: divided by √(1 + steps /
    ``fall``) from then on, until ``learning_rate`` is reached."""
    fall: int = 30
    weight_decay: float = 0.01
    warmup: int = 20
    clip: float = 1.0
    averaging: float = 0.99
    """What is published is an average over about 1 / (1 - averaging) steps: it stands in for a falling learning rate,
    which training without an end cannot have."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of training."""

    step: int
    loss: float
    tokens: int
    """Positions learned."""
    right: tuple[float, ...]
    """Share of the positions where the first 1, 2, … draft tokens are right; among the candidates of the step, where
    these stand for the draft vocabulary."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one part of a step adds: each a sum over its positions."""

    loss: float
    right: Tensor
    tokens: int
    gradients: Sequence[Tensor]


class Trainer:
    def __init__(
        self, head: TrainableHead, options: TrainOptions, is_cold: bool = False, threads: Threads | None = None
    ) -> None:
        """``is_cold``: the head has learned nothing yet."""
        self.head = head
        self.options = options
        """The loss may be replaced between steps."""
        self.step = 0
        self.is_cold = is_cold
        self._threads = threads or Threads()
        matrices = [name for name in head.trained if head.weights[name].dim() == 2]
        vectors = [name for name in head.trained if head.weights[name].dim() == 1]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(
                [head.weights[name] for name in matrices],
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                dtype=head.dtype,
                threads=self._threads,
                between=head.between,
            ),
            torch.optim.AdamW(
                [head.weights[name] for name in vectors],
                lr=0.1 * options.learning_rate,
                weight_decay=0.0,
                betas=(0.9, 0.95),
            ),
        ]
        self._average = {name: head.weights[name].detach().clone() for name in head.trained}

    def learn(self, parts: Iterable[Sequence[Example]]) -> Progress:
        """One step on all these texts; each of ``parts`` is computed by one thread."""
        learned = self._threads.map(lambda part: self._part(part[1], part[0]), enumerate(parts))
        tokens = sum(each.tokens for each in learned)
        loss = sum(each.loss for each in learned)
        right = sum((each.right for each in learned), torch.zeros(self.options.steps))
        if tokens:
            for name, *gradients in zip(self.head.trained, *(each.gradients for each in learned), strict=True):
                # In one order, however the threads went: a resumed training does the same as one without a break.
                self.head.weights[name].grad = torch.stack([gradient.float() for gradient in gradients]).sum(0) / tokens
            self._update()
        return Progress(self.step, loss / max(tokens, 1), tokens, tuple((right / max(tokens, 1)).tolist()))

    def _part(self, examples: Sequence[Example], number: int) -> _Part:
        options = self.options
        device = self.head.device
        batch = pack(examples, options.steps, device)
        total = torch.zeros((), device=device)
        right = torch.zeros(options.steps, device=device)
        targets = [self._targets(batch, step) for step in range(options.steps)]
        some, seed = None, self.step * MOST_PARTS + number
        if options.loss == "ce":
            some = candidates.choose([columns for columns, _ in targets], self.head.config.draft_vocab_size, seed)
        chance = torch.Generator().manual_seed(seed)
        drafting = self.head.draft(batch)
        for step in range(options.steps):
            columns, exists = (each[drafting.rows] for each in targets[step])
            exists = exists & drafting.counts
            logits = self.head.logits(drafting.hidden, some)
            if some is not None:
                columns = some.place[columns]
            per_row = losses.loss(options.loss, logits, columns, self._probs(batch, step, drafting.rows))
            total = total + options.step_decay**step * per_row[exists].sum()
            with torch.no_grad():
                is_right = logits.max(-1).indices == columns
                right[step] = is_right[exists].sum()
            if step + 1 < options.steps:
                goes_on = is_right if options.loss == "ce" else losses.drafted(logits.detach(), columns, chance)
                drafting.extend(exists & goes_on)
        gradients = torch.autograd.grad(total, self.head.inputs)
        return _Part(float(total.detach()), right.cpu(), len(batch.learned), gradients)

    def published(self) -> dict[str, Tensor]:
        """The averaged weights, in the published layout, on the CPU."""
        return {**self.head.tensors(), **{name: tensor.to("cpu", copy=True) for name, tensor in self._average.items()}}

    def state(self) -> dict[str, Any]:
        """All that training needs to go on as if it had not stopped; frozen weights are not part of it."""
        return {
            "step": self.step,
            "is_cold": self.is_cold,
            "weights": {name: self.head.weights[name].detach() for name in self.head.trained},
            "average": self._average,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` returned."""
        self.step, self.is_cold = state["step"], state.get("is_cold", False)
        with torch.no_grad():
            for name in self.head.trained:
                self.head.weights[name].copy_(state["weights"][name])
                self._average[name].copy_(state["average"][name])
        self.head.refresh()
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def _rate(self) -> float:
        options = self.options
        rate = options.learning_rate
        if self.is_cold:
            rate = max(rate, options.first_rate / math.sqrt(1 + self.step / options.fall))
        return rate * min((self.step + 1) / options.warmup, 1.0)

    def _targets(self, batch: Pack, step: int) -> tuple[Tensor, Tensor]:
        """Tokens to draft as indices of the draft vocabulary (-1: not in it), and which rows have one."""
        tokens = batch.targets[:, step]
        exists = tokens >= 0
        return torch.where(exists, self.head.to_draft[tokens.clamp_min(0)], -1), exists

    def _probs(self, batch: Pack, step: int, rows: Tensor) -> Tensor | None:
        if batch.likely is None or self.options.loss == "ce":
            return None
        ids, logprobs = (part[rows, step] for part in batch.likely)
        return losses.dense(ids, logprobs, self.head.to_draft, self.head.config.draft_vocab_size)

    def _update(self) -> None:
        options = self.options
        trained = [self.head.weights[name] for name in self.head.trained]
        if not torch.nn.utils.clip_grad_norm_(trained, options.clip).isfinite():
            # Of damaged features, say: one such step, and nothing could be learned any more.
            for weight in trained:
                weight.grad = None
            return
        for optimizer, factor in zip(self._optimizers, (1.0, 0.1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * self._rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.head.refresh()
        # At the start the average is short: a beginner's weights should not linger in it.
        keep = min(options.averaging, self.step / (self.step + 10))
        with torch.no_grad():
            for name, average in self._average.items():
                average.lerp_(self.head.weights[name], 1 - keep)
