"""Networks race their own distribution with the noise of the target: how often that is right, and what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slipstream.drafter.autoregressive import AutoregressiveDrafter
from slipstream.drafter.draft_model import ModelDrafter
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.loader import build_model
from slipstream.engine.runner.row_drafts import RowDrafts
from slipstream.engine.runner.speculator import Speculator
from slipstream.engine.speculation.protocol import DraftRow
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels.compute import Formats

Engine = Callable[..., LocalEngine]
PROMPTS = [[a, b, 3] for a in range(8) for b in range(4)]
FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
}


@pytest.fixture(scope="module")
def nearly(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is nearly the target."""
    path = tmp_path_factory.mktemp("nearly")
    (path / "config.json").write_text((tiny / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(tiny / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.25 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path / "model.safetensors")
    return path


def draft_model(path: Path, width: int = 1) -> ModelDrafter:
    def load(_: Any, length: int) -> Any:
        options = EngineConfig(model=str(path), dtype="float32")
        return build_model(open_checkpoint(str(path)), options, Formats.of(torch.float32), torch.device("cpu"), length)

    return ModelDrafter(load, stop_below=0.0, width=width)


def answers(local: LocalEngine, asked: Sequence[SamplingParams]) -> list[list[int]]:
    done = [local.submit(prompt, params) for prompt, params in zip(PROMPTS, asked, strict=True)]
    local.finish()
    return [each.tokens for each in done]


def speculate(local: LocalEngine, **params: Any) -> list[list[int]]:
    return answers(
        local, [SamplingParams(**({"max_tokens": 40, "seed": 100 + i} | params)) for i in range(len(PROMPTS))]
    )


def acceptance(local: LocalEngine) -> float:
    """The share of the draft tokens that were verified."""
    [stats] = local.stats.drafters
    assert stats.draft_tokens > 300
    return stats.accepted_tokens / stats.draft_tokens


@pytest.mark.parametrize("name", list(FILTERS))
def test_the_target_as_its_own_drafter_is_always_right(engine: Engine, tiny: Path, name: str) -> None:
    """So it has the request's seed, the index of every token, its temperature and its filters."""
    local = engine([draft_model(tiny)])
    speculate(local, **FILTERS[name])
    assert acceptance(local) > 0.99


def another_seed(scores: Tensor, rows: Sequence[DraftRow], depth: int) -> tuple[Sequence[DraftRow], int]:
    for row in rows:
        row.seed = row.seed | 1 << 40
    return rows, depth


def another_index(scores: Tensor, rows: Sequence[DraftRow], depth: int) -> tuple[Sequence[DraftRow], int]:
    return rows, depth + 1


def no_filters(scores: Tensor, rows: Sequence[DraftRow], depth: int) -> tuple[Sequence[DraftRow], int]:
    for row in rows:
        row.params = SamplingParams(max_tokens=1)
    return rows, depth


@pytest.mark.parametrize(
    ("mistake", "params"),
    [(another_seed, {}), (another_index, {}), (no_filters, {"temperature": 0.5}), (no_filters, {"top_k": 2})],
)
def test_a_planted_error_costs_acceptance_and_changes_nothing(
    engine: Engine, tiny: Path, mistake: Any, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = speculate(engine(), **params)
    race = AutoregressiveDrafter._race

    def wrong(self: AutoregressiveDrafter, scores: Tensor, rows: Sequence[DraftRow], depth: int) -> Any:
        return race(self, scores, *mistake(scores, rows, depth))

    monkeypatch.setattr(AutoregressiveDrafter, "_race", wrong)
    local = engine([draft_model(tiny)])
    assert speculate(local, **params) == plain
    assert acceptance(local) < 0.9


@pytest.mark.parametrize("width", [1, 3])
def test_a_race_is_right_more_often_than_the_most_likely_token(
    engine: Engine, nearly: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tree, too, whose branches are the next runners-up; and answers do not depend on it."""
    plain = speculate(engine())
    rates = []
    for races in (True, False):
        if not races:
            monkeypatch.setattr(AutoregressiveDrafter, "_race", lambda self, scores, *_: self._most_likely(scores))
        local = engine([draft_model(nearly, width)], draft_width=width)
        assert speculate(local) == plain
        rates.append(acceptance(local))
    assert rates[0] > 1.1 * rates[1], rates


def test_greedy_and_sampled_requests_share_a_step(engine: Engine, tiny: Path) -> None:
    """Each row is drafted for as if it were alone."""
    asked = [
        SamplingParams(max_tokens=30, temperature=[0.0, 1.0, 0.5][i % 3], seed=i, top_k=[0, 5][i % 2])
        for i in range(len(PROMPTS))
    ]
    for width in (1, 3):
        plain = answers(engine(), asked)
        local = engine([draft_model(tiny, width)], draft_width=width)
        assert answers(local, asked) == plain
        assert width > 1 or acceptance(local) > 0.99


def test_offers_tell_how_often_draft_tokens_are_right(
    engine: Engine, nearly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where greedy requests, whose drafts are right much more often, run beside the sampled ones."""
    offered: dict[bool, list[tuple[float, bool]]] = {True: [], False: []}
    learn = Speculator._learn

    def watch(self: Speculator, row: RowDrafts, proposal: Any, sampled: Sequence[int]) -> int:
        right = [i for i, parent in enumerate(proposal.tree.parents) if parent < 0]
        for i in right:
            races = row.draft.params.temperature > 0
            offered[races].append((proposal.chances[i], proposal.tree.tokens[i] == sampled[0]))
        return learn(self, row, proposal, sampled)

    monkeypatch.setattr(Speculator, "_learn", watch)
    local = engine([draft_model(nearly, 2)], draft_width=2)
    for first in (0, 1000):
        asked = [SamplingParams(max_tokens=60, temperature=float(i % 2), seed=first + i) for i in range(len(PROMPTS))]
        answers(local, asked)
    for found in offered.values():
        chance, right = np.array(found[len(found) // 4 :]).T
        assert len(chance) > 1000
        for part in np.array_split(chance.argsort(), 3):
            assert abs(chance[part].mean() - right[part].mean()) < 0.08, (chance[part].mean(), right[part].mean())


def test_a_distribution_without_numbers_gets_no_draft_tokens(
    engine: Engine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = ModelDrafter._scores
    monkeypatch.setattr(ModelDrafter, "_scores", lambda self, hidden: scores(self, hidden).fill_(float("nan")))
    for temperature in (0.0, 1.0):
        for width in (1, 3):
            local = engine([draft_model(tiny, width)], draft_width=width)
            speculate(local, max_tokens=5, temperature=temperature)
            assert local.stats.drafters[0].draft_tokens == 0
