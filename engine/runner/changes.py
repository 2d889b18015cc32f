"""What requests change of their logits before a token is sampled, as lists that all rows of a step share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slipstream.engine.messages import SamplingParams
from slipstream.kernels import ops
from slipstream.kernels.batch import Int32

History = Callable[[int], Int32]
"""Prompt and output before the token that row i of a batch samples; valid during the call."""
Float32 = NDArray[np.float32]
UNSEEN = -1


def is_plain(params: SamplingParams) -> bool:
    """Whether a token is just sampled from the logits as they come: nothing is changed or reported."""
    return (
        params.logprobs is None
        and not penalizes(params)
        and not params.logit_bias
        and not params.allowed_token_ids
        and not params.bad_words
        and params.min_tokens == 0
    )


def penalizes(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty)


def reads_history(params: SamplingParams) -> bool:
    """Whether what is changed depends on the tokens before."""
    return penalizes(params) or bool(params.bad_words)


def excludes(params: SamplingParams) -> bool:
    """Whether a request rules tokens out, so that none may be left."""
    return bool(params.allowed_token_ids or params.bad_words or params.logit_bias or params.min_tokens)


@dataclass(frozen=True, slots=True)
class Changes:
    """Lists of all rows one behind the other, see ``ops.change_logits``; and the tokens that rows are restricted to."""

    rows: Int32
    place: Int32
    tokens: Int32
    added: Float32
    counts: Int32
    repetition: Float32
    frequency: Float32
    presence: Float32
    allowed: Mapping[int, Int32]
    """By row: ascending."""

    @classmethod
    def of(
        cls,
        special: Mapping[int, SamplingParams],
        num_output: NDArray[np.int64],
        history: History,
        faults: dict[int, Exception],
    ) -> Changes:
        """``special`` rows' changes after so many tokens of output; ``faults`` gets those that cannot be told."""
        rows: list[int] = []
        factors, lists = [], []
        allowed: dict[int, Int32] = {}
        for i, params in special.items():
            try:
                if params.allowed_token_ids:
                    allowed[i] = np.unique(np.array(params.allowed_token_ids, np.int32))
                said = history(i) if reads_history(params) else _NONE
                added = _added(params, int(num_output[i]), said)
                if not added and not penalizes(params):
                    continue
                mine = _list(params, int(num_output[i]), said, added)
                numbers = np.array((params.repetition_penalty, params.frequency_penalty, params.presence_penalty))
                with np.errstate(over="ignore"):
                    factors.append(numbers.astype(np.float32))
                rows.append(i)
                lists.append(mine)
            except Exception as error:
                faults[i] = error
        if not lists and not allowed:
            return NO_CHANGES
        counts = [len(tokens) for tokens, _, _ in lists]
        place = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        columns = [np.concatenate([each[at] for each in lists]) if lists else np.empty(0) for at in range(3)]
        repetition, frequency, presence = np.ascontiguousarray(np.array(factors, np.float32).reshape(-1, 3).T)
        three = columns[0].astype(np.int32), columns[1].astype(np.float32), columns[2].astype(np.int32)
        at = np.array(rows, np.int32)
        return cls(at, place, *three, repetition, frequency, presence, allowed)

    def alone(self, i: int) -> Changes:
        """Those of row i, as of row 0."""
        at = np.flatnonzero(self.rows == i)
        mine = np.isin(self.place, at)
        return Changes(
            rows=np.zeros(len(at), np.int32),
            place=np.zeros(int(mine.sum()), np.int32),
            tokens=self.tokens[mine],
            added=self.added[mine],
            counts=self.counts[mine],
            repetition=self.repetition[at],
            frequency=self.frequency[at],
            presence=self.presence[at],
            allowed={0: self.allowed[i]} if i in self.allowed else {},
        )

    def columns(self, rows: int) -> tuple[NDArray[Any], ...]:
        """Eight for ``ops.change_logits`` if it has something to do, then two for ``ops.allow_only`` if that has."""
        found: tuple[NDArray[Any], ...] = ()
        if len(self.rows):
            found = self.rows, self.place, self.tokens, self.added, self.counts
            found += self.repetition, self.frequency, self.presence
        if self.allowed:
            lists = [self.allowed.get(i, np.empty(0, np.int32)) for i in range(rows)]
            start = np.cumsum([0, *map(len, lists)], dtype=np.int32)
            found += start, np.concatenate(lists)
        return found


_NONE: Int32 = np.empty(0, np.int32)
_NO_NUMBER: Float32 = np.empty(0, np.float32)
NO_CHANGES = Changes(_NONE, _NONE, _NONE, _NO_NUMBER, _NONE, _NO_NUMBER, _NO_NUMBER, _NO_NUMBER, {})


def _added(params: SamplingParams, num_output: int, history: Int32) -> dict[int, float]:
    """What is added to the logits of tokens, whatever was said of them."""
    added = dict(params.logit_bias or {})
    for word in params.bad_words:
        head = len(word) - 1
        if num_output >= head and history[len(history) - head :].tolist() == list(word[:-1]):
            added[word[-1]] = ops.NEVER
    if num_output < params.min_tokens and params.stop_token_ids and not params.grammar:
        added |= dict.fromkeys(params.stop_token_ids, ops.NEVER)
    return added


def _list(
    params: SamplingParams, num_output: int, history: Int32, added: Mapping[int, float]
) -> tuple[Int32, Float32, Int32]:
    """Distinct tokens, what is added to the logit of each, and how often it was said: 0 if in the prompt only."""
    seen, counts = np.empty(0, np.int32), np.empty(0, np.int32)
    if penalizes(params):
        seen, at = np.unique(history, return_inverse=True)
        counts = np.bincount(at[len(history) - num_output :], minlength=len(seen)).astype(np.int32)
    known = set(seen.tolist())
    others = np.array([token for token in added if token not in known], np.int32)
    with np.errstate(over="ignore"):
        values = np.array([added.get(token, 0.0) for token in seen.tolist()] if added else np.zeros(len(seen)))
        of_others = np.array([added[token] for token in others.tolist()])
        biases = np.concatenate((values, of_others)).astype(np.float32)
    return np.concatenate((seen, others)), biases, np.concatenate((counts, np.full(len(others), UNSEEN, np.int32)))
