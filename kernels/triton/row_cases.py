"""Cases of Triton's kernels on rows that are not behind ``ops``; see ``slipstream.kernels.cases``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels import reference
from slipstream.kernels.cases import Case, Outputs, Prepared, Sizes, Source, called, size
from slipstream.kernels.triton import activation, experts, logits, logprobs, norm, rows

FLOAT32 = (torch.float32,)
MOST_EXPERTS, TOP, EXPERT_INNER = 32, 4, 768
"""A mixture with a quarter of Qwen3-30B-A3B's experts, of which a token asks half as many."""
_PLAIN = reference.ReferenceOps()


def cases() -> Iterator[Case]:
    yield Case("add and rms_norm", _add_rms_norm)
    yield Case("gelu_tanh_mul of halves", _gelu_halves)
    yield Case("take rows", _take_rows)
    yield Case("route to experts", _route, FLOAT32)
    yield Case("experts", _experts)
    yield Case("log-probabilities", _log_probabilities, FLOAT32)
    yield Case("penalties, biases and bans", _changes, FLOAT32)
    yield Case("allowed tokens", _allowed, FLOAT32)


def _add_rms_norm(source: Source, sizes: Sizes) -> Prepared:
    x, residual = (source.normal(sizes.tokens, sizes.hidden) for _ in range(2))
    weight = source.normal(sizes.hidden)

    def found() -> Outputs:
        added = residual.clone()
        return norm.add_rms_norm(x, added, weight, 1e-5), added

    def expected() -> Outputs:
        added = (x.float() + residual.float()).to(x.dtype).float()
        return _PLAIN.rms_norm(added, weight.float(), 1e-5), added

    again = residual.clone()
    return Prepared(lambda: norm.add_rms_norm(x, again, weight, 1e-5), found, expected, 4 * size(x))


def _gelu_halves(source: Source, sizes: Sizes) -> Prepared:
    both = source.normal(sizes.tokens, 2 * sizes.intermediate)

    def expected() -> Tensor:
        gate, up = both.float().chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    return called(lambda: activation.gelu_tanh_mul_halves(both), expected, 3 * size(both) // 2)


def _take_rows(source: Source, sizes: Sizes) -> Prepared:
    table = source.normal(sizes.tokens + 3, sizes.hidden)
    index = source.integers(len(table), sizes.tokens)
    index[0] = -1

    def expected() -> Tensor:
        return table.float()[index.long()] * (index >= 0)[:, None]

    return called(
        lambda: rows.take_rows(table, index), expected, 2 * sizes.tokens * sizes.hidden * table.element_size()
    )


def _route(source: Source, sizes: Sizes) -> Prepared:
    scores = source.normal(sizes.tokens, MOST_EXPERTS)

    def found() -> Outputs:
        routes = experts.route(scores, TOP, True)
        return routes.experts, routes.shares

    def expected() -> Outputs:
        return reference.route(scores, TOP, True)

    return Prepared(found, found, expected, size(scores))


def _experts(source: Source, sizes: Sizes) -> Prepared:
    hidden = min(sizes.hidden, 2048)
    inner = min(sizes.intermediate, EXPERT_INNER)
    tokens, count = min(sizes.tokens, 512), min(MOST_EXPERTS, hidden // 8)
    x = source.normal(tokens, hidden)
    gate_up = source.normal(count, 2 * inner, hidden, scale=0.02)
    down = source.normal(count, hidden, inner, scale=0.02)
    scores = source.normal(tokens, count, dtype=torch.float32)
    routes = experts.Routes(scores.topk(TOP).indices.int(), scores.topk(TOP).values.softmax(-1))
    asked = min(count, tokens * TOP)
    return called(
        lambda: experts.experts_mlp(x, routes, gate_up, down),
        lambda: reference.experts_mlp(x.float(), routes.experts, routes.shares, gate_up.float(), down.float()),
        2 * size(x) + (size(gate_up) + size(down)) * asked // count,
        6 * tokens * TOP * hidden * inner,
    )


def _log_probabilities(source: Source, sizes: Sizes) -> Prepared:
    given = source.normal(sizes.streams, sizes.vocab, scale=3.0)
    tokens = source.integers(sizes.vocab, sizes.streams)

    def expected() -> Outputs:
        every = given.log_softmax(-1)
        chosen = every.gather(1, tokens.long()[:, None])
        top = every.topk(5)
        return chosen[:, 0], (every > chosen).sum(1) + 1, top.indices, top.values

    return called(lambda: logprobs.log_probabilities(given, tokens, 5), expected, size(given))


def _lists(source: Source, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Where lists of ascending tokens begin, of each row some, and the tokens."""
    each = min(16, sizes.vocab // 4)
    start = (torch.arange(sizes.streams + 1) * each).int().to(source.device)
    tokens = torch.arange(each).repeat(sizes.streams, 1) * 3 + torch.arange(sizes.streams)[:, None] % 3
    return start, tokens.int().flatten().to(source.device)


def _changes(source: Source, sizes: Sizes) -> Prepared:
    given = source.normal(sizes.streams, sizes.vocab)
    _, tokens = _lists(source, sizes)
    rows = torch.arange(sizes.streams, device=source.device).int()
    place = rows.repeat_interleave(len(tokens) // sizes.streams)
    added, counts = source.normal(len(tokens)), source.integers(4, len(tokens)) - 1
    one = torch.ones(sizes.streams, device=source.device)
    lists = (rows, place, tokens, added, counts, 1.3 * one, 0.2 * one, 0.1 * one)

    def made(change: Callable[..., None]) -> Tensor:
        changed = given.clone()
        change(changed, *lists)
        return changed

    return called(lambda: made(logits.change_logits), lambda: made(_PLAIN.change_logits), 8 * size(tokens))


def _allowed(source: Source, sizes: Sizes) -> Prepared:
    given = source.normal(sizes.streams, sizes.vocab)
    start, tokens = _lists(source, sizes)

    def expected() -> Tensor:
        row = torch.arange(sizes.streams, device=source.device).repeat_interleave(len(tokens) // sizes.streams)
        made = torch.full_like(given, reference.NEVER)
        made[row, tokens.long()] = given[row, tokens.long()]
        return made

    def found() -> Tensor:
        made = given.clone()
        logits.allow_only(made, start, tokens)
        return made

    return called(found, expected, size(given))
