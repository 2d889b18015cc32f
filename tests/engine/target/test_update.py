"""Updates of the target's weights while it serves: what comes after one is what a fresh engine would say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.manifest import Training
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, MisfitError, ModelError, SupersededError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig, decoder_config
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    Operation,
    Pause,
    ReadTarget,
    Resume,
    SwapDrafter,
    UpdateMode,
)
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy

Tensors = dict[str, Tensor]
CONFIG = POLICY
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
MODES = get_args(UpdateMode)


def write(folder: Path, seed: int, config: dict[str, Any] = CONFIG) -> Path:
    return write_policy(folder, policy(seed, config), config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model with three sets of weights."""
    root = tmp_path_factory.mktemp("policies")
    return [write(root / str(seed), seed) for seed in range(3)]


def engine(folder: Path, drafters: Sequence[Drafter] = (), **fields: Any) -> LocalEngine:
    options: dict[str, Any] = {"kv_cache_memory": "4MiB", "max_running": 8, "dtype": "float32", "pipeline": "off"}
    return LocalEngine(EngineConfig(model=str(folder), **(options | fields)), drafters)


@pytest.fixture(scope="module")
def fresh(folders: list[Path]) -> Callable[[int], list[list[int]]]:
    """What an engine says that begins with the weights of this number."""
    answers = []
    for folder in folders:
        local = engine(folder)
        answers.append([done.tokens for done in local.generate(PROMPTS, GREEDY)])
        local.close()
    assert answers[0] != answers[1] != answers[2], "the weights have to matter"
    return lambda which: answers[which]


@pytest.fixture
def local(folders: list[Path]) -> Iterator[LocalEngine]:
    local = engine(folders[0])
    yield local
    local.close()


def tell(local: LocalEngine, *operations: Operation[Any]) -> Any:
    """The answer to the last one."""
    return local.operate(*operations)


def buckets(tensors: Tensors, rng: Random) -> list[tuple[bytes, dict[str, int]]]:
    """All rows of all tensors, cut anywhere, in any order."""
    parts: list[tuple[str, int, Tensor]] = []
    for name, tensor in tensors.items():
        cuts = sorted({0, len(tensor), *(rng.randrange(len(tensor)) for _ in range(rng.randrange(3)))})
        parts += [(name, begin, tensor[begin:end].clone()) for begin, end in pairwise(cuts)]
    rng.shuffle(parts)
    return [(save({name: rows}), {name: begin}) for name, begin, rows in parts]


def update(local: LocalEngine, version: int, tensors: Tensors, mode: UpdateMode, rng: Random | None = None) -> Any:
    fills = [FillTarget(version, *bucket) for bucket in buckets(tensors, rng or Random(version))]
    return tell(local, BeginTargetUpdate(version, mode), *fills, FinishTargetUpdate(version))


@pytest.mark.parametrize("options", [{}, {"kernels": "torch"}, {"dtype": "bfloat16"}, {"pipeline": "on"}], ids=str)
def test_after_an_update_the_engine_is_a_fresh_one(
    folders: list[Path], fresh: Callable[[int], list[list[int]]], options: dict[str, Any]
) -> None:
    """Whatever it said before, and though the prompts are the same."""
    local = engine(folders[0], **options)
    before = [done.tokens for done in local.generate(PROMPTS, GREEDY)]
    report = update(local, 5, policy(1), "recompute")
    assert report.version == 5 and report.pause_seconds >= 0 < report.prepare_seconds
    after = local.generate(PROMPTS, GREEDY)
    other = engine(folders[1], **options)
    assert [done.tokens for done in after] == [done.tokens for done in other.generate(PROMPTS, GREEDY)] != before
    assert {delta.target_version for done in after for delta in done.deltas} == {5}
    assert local.stats.target_version == 5
    if options != {"dtype": "bfloat16"}:
        assert [done.tokens for done in after] == fresh(1)
    local.close()
    other.close()


@settings(max_examples=15)
@given(st.randoms(use_true_random=False), st.integers(0, 2))
def test_buckets_may_be_cut_anywhere_and_come_in_any_order(
    folders: list[Path], fresh: Callable[[int], list[list[int]]], rng: Random, which: int
) -> None:
    local = engine(folders[2])
    update(local, 1, policy(which), "keep", rng)
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(which)
    local.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_what_becomes_of_running_requests(
    folders: list[Path], fresh: Callable[[int], list[list[int]]], mode: UpdateMode, pipeline: str
) -> None:
    local = engine(folders[0], pipeline=pipeline)
    long = SamplingParams(max_tokens=200, temperature=0.0)
    running = [local.submit(prompt, long) for prompt in PROMPTS]
    for _ in range(8):
        local.step()
    tell(local, BeginTargetUpdate(1, mode), FillTarget(1, save(policy(1))))
    assert all(delta.target_version == 0 for done in running for delta in done.deltas)
    tell(local, FinishTargetUpdate(1))
    local.finish()
    for prompt, done in zip(PROMPTS, running, strict=True):
        old = [token for delta in done.deltas if not delta.target_version for token in delta.tokens]
        if mode == "abort":
            assert done.finish_reason == "abort" and done.tokens == old
            continue
        assert done.finish_reason == "length" and 0 < len(old) < len(done.tokens) == 200
        if mode == "recompute":  # the new weights go on with the text as if it were their own prompt
            other = engine(folders[1])
            rest = SamplingParams(max_tokens=200 - len(old), temperature=0.0)
            assert [each.tokens for each in other.generate([[*prompt, *old]], rest)] == [done.tokens[len(old) :]]
            other.close()
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(1)
    local.close()


def random_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 16)
    tensors = layout.random_tensors(config, 0)
    rows = layout.draft_tokens(config, tensors)
    return FirstHead(config, {**tensors, "lm_head.weight": policy(0)["lm_head.weight"][rows]})


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_head_drafts_with_the_rows_of_the_new_output_matrix(
    folders: list[Path], fresh: Callable[[int], list[list[int]]], kernels: str
) -> None:
    head = HeadDrafter(random_head, stop_below=0.0)
    local = engine(folders[0], [head], kernels=kernels, speculation_policy="fixed", max_draft_tokens=3)
    local.generate(PROMPTS, GREEDY)

    def rows() -> Tensor:
        [held] = head._held.values()
        assert held.weights.output is not None
        return held.weights.output.rows(torch.arange(16))

    chosen = layout.draft_tokens(
        *[getattr(random_head(decoder_config(CONFIG)), name) for name in ("config", "tensors")]
    )
    assert torch.equal(rows(), policy(0)["lm_head.weight"][chosen])
    update(local, 1, policy(1), "recompute")
    assert torch.equal(rows(), policy(1)["lm_head.weight"][chosen])
    done = local.generate(PROMPTS, GREEDY)
    assert [each.tokens for each in done] == fresh(1)
    assert sum(delta.num_drafted for each in done for delta in each.deltas) > 10
    local.close()


def test_a_version_that_shares_the_targets_rows_gets_those_that_serve(folders: list[Path], tmp_path: Path) -> None:
    """It was trained on older weights, and comes when others serve."""
    registry = Registry(tmp_path)
    config, head = EngineConfig(model=str(folders[0])), random_head(decoder_config(CONFIG))
    target = served_fingerprint(config)
    versions = [
        registry.add(
            head.config, head.tensors, target=target, origin="trained", training=Training(shares_output=shares)
        )
        for shares in (False, True)
    ]
    paths = [str(registry.path(version.version)) for version in versions]
    [drafter] = make_drafters(EngineConfig(model=str(folders[0]), drafter=paths[0], speculation="head"))
    assert isinstance(drafter, HeadDrafter)
    local = engine(folders[0], [drafter])
    update(local, 1, policy(1), "recompute")
    chosen = layout.draft_tokens(head.config, head.tensors)
    for version, path in zip((7, 8), paths, strict=True):
        tell(local, SwapDrafter(version, "", path))
        output = drafter._held[""].weights.output
        assert output is not None
        expected = policy(0) if version == 7 else policy(1)
        assert torch.equal(output.rows(torch.arange(16)).bfloat16(), expected["lm_head.weight"][chosen].bfloat16())
    local.close()


def test_a_model_that_runs_through_transformers_is_updated_too(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    def write_fallback(seed: int) -> Path:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = AutoConfig.for_model("gpt_neox", vocab_size=64, max_position_embeddings=128, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(seed))
        return tmp_path / str(seed)

    first, second = write_fallback(0), write_fallback(1)
    local, other = engine(first), engine(second)
    expected = [done.tokens for done in other.generate(PROMPTS, GREEDY)]
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] != expected
    tell(local, BeginTargetUpdate(1), ReadTarget(1, str(second)), FinishTargetUpdate(1))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == expected
    local.close()
    other.close()


def test_weights_may_come_from_files(local: LocalEngine, folders: list[Path], fresh: Any) -> None:
    tell(local, BeginTargetUpdate(1), ReadTarget(1, str(folders[1])), FinishTargetUpdate(1))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(1)
    tell(local, BeginTargetUpdate(2), ReadTarget(2, str(folders[2] / "model.safetensors")), FinishTargetUpdate(2))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(2)


def without(name: str) -> bytes:
    return save({each: tensor for each, tensor in policy(1).items() if each != name})


NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
INFINITE = policy(1)[EMBEDDING].bfloat16().clone()
INFINITE[-1, -1] = -torch.inf
BROKEN: dict[str, Any] = {
    "a tensor is missing": ([FillTarget(1, without(NORM)), FinishTargetUpdate(1)], "lacks 1 tensors.*norm"),
    "a row is missing": (
        [FillTarget(1, without(NORM)), FillTarget(1, save({NORM: torch.ones(63)}), {NORM: 1}), FinishTargetUpdate(1)],
        "lacks 1 tensors",
    ),
    "nothing came": ([FinishTargetUpdate(1)], "lacks"),
    "rows without their place": ([FillTarget(1, save({NORM: torch.ones(5)}))], "has shape"),
    "a size is wrong": ([FillTarget(1, save({NORM: torch.ones(65)}))], "has shape"),
    "rows lie outside": ([FillTarget(1, save({NORM: torch.ones(60)}), {NORM: 10})], "has shape.*row 10"),
    "rows before the first": ([FillTarget(1, save({NORM: torch.ones(60)}), {NORM: -1})], "has shape"),
    "not a number": ([FillTarget(1, save({NORM: torch.full((64,), torch.nan)}))], "not finite"),
    "an infinite one": ([FillTarget(1, save({EMBEDDING: INFINITE}))], f"{EMBEDDING}.*not finite"),
    "an unknown name": ([FillTarget(1, save({"model.nose": torch.ones(3)}))], "model.nose"),
    "no safetensors": ([FillTarget(1, b"what")], "no safetensors file"),
    "no such file": ([ReadTarget(1, "/nowhere/at/all")], "no model at"),
    "another version": ([FinishTargetUpdate(2)], "no update to version 2 is under way, but one to version 1"),
    "it was cancelled": ([CancelTargetUpdate(1), FinishTargetUpdate(1)], "but none"),
    "another was begun": ([BeginTargetUpdate(3), FillTarget(1, without(NORM))], "but one to version 3"),
    "the version of the files": ([BeginTargetUpdate(0)], "from 1 on", ConfigError),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_update_that_is_broken_off_leaves_the_old_weights(
    local: LocalEngine, folders: list[Path], fresh: Any, broken: Any
) -> None:
    operations, message, *error = broken
    running = local.submit(PROMPTS[0], GREEDY)
    with pytest.raises(error[0] if error else ModelError, match=message):
        tell(local, BeginTargetUpdate(1), *operations)
    local.finish()
    assert running.tokens == fresh(0)[0] and local.stats.target_version == 0
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(0)
    update(local, 4, policy(1), "recompute")
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(1)


def test_after_a_failure_nothing_more_is_taken_and_the_reason_is_told(local: LocalEngine, fresh: Any) -> None:
    with pytest.raises(ModelError, match="has shape"):
        tell(local, BeginTargetUpdate(1), FillTarget(1, save({NORM: torch.ones(65)})))
    for operation in (FillTarget(1, save(policy(1))), FinishTargetUpdate(1)):
        with pytest.raises(ModelError, match=r"cannot be finished: tensor .* has shape"):
            tell(local, operation)
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(0)


def test_other_models_are_refused(local: LocalEngine, tmp_path: Path) -> None:
    for change in ({"rope_theta": 5.0}, {"num_hidden_layers": 1}, {"rms_norm_eps": 0.1}, {"model_type": "qwen2"}):
        other = write(tmp_path / "other", 1, CONFIG | change)
        with pytest.raises(MisfitError, match="is not the model that runs here"):
            tell(local, BeginTargetUpdate(1), ReadTarget(1, str(other)))


def test_cancelling_while_it_is_finished_leaves_the_old_weights(local: LocalEngine, fresh: Any) -> None:
    tell(local, BeginTargetUpdate(1), FillTarget(1, save(policy(1))))
    finishing = local.engine.operate(FinishTargetUpdate(1))
    cancelled = local.engine.operate(CancelTargetUpdate(1))
    with pytest.raises((SupersededError, ModelError), match="cancelled"):
        local.wait(finishing)
    local.wait(cancelled)
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(0)


def test_what_comes_after_the_end_is_not_laid_into_weights_that_serve(local: LocalEngine, fresh: Any) -> None:
    tell(local, BeginTargetUpdate(1), FillTarget(1, save(policy(1))))
    finishing = local.engine.operate(FinishTargetUpdate(1))
    late = local.engine.operate(FillTarget(1, save(policy(2))))
    local.wait(finishing)
    with pytest.raises(SupersededError, match="serves already"):
        local.wait(late)
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(1)


def test_no_memory_for_a_second_set_of_weights_is_said(local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slipstream.engine.target.update.available_memory", lambda _: 1 << 20)
    with pytest.raises(ModelError, match=r"other weights take .* and only 1.0 MiB of memory are free"):
        tell(local, BeginTargetUpdate(1))


def test_fifty_updates_leave_nothing_behind(local: LocalEngine, fresh: Any) -> None:
    """Old weights are freed, and a block is held by nobody."""
    import gc
    import weakref

    seen = weakref.WeakSet[Any]()
    long = SamplingParams(max_tokens=100, temperature=0.0)
    for number in range(1, 51):
        local.submit(PROMPTS[number % 3], long)
        local.step()
        mode: UpdateMode = MODES[number % 3]
        update(local, number, policy(number % 3), mode)
        seen.add(local.engine.loaded.model._weights)  # type: ignore[attr-defined]
    gc.collect()
    assert len(seen) == 1
    local.finish()
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == fresh(50 % 3)
    assert local.engine.scheduler.kv.pool.num_used == 0


def test_an_engine_that_is_paused_does_nothing_and_goes_on(local: LocalEngine, fresh: Any) -> None:
    running = [local.submit(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(3):
        local.step()
    tell(local, Pause("keep"))
    assert local.stats.is_paused is False and local.engine.core.stats().is_paused
    assert not local.engine.core.has_work
    late = local.submit(PROMPTS[0], GREEDY)
    assert not local.engine.core.has_work
    tell(local, Resume())
    local.finish()
    assert [done.tokens for done in running] == fresh(0) and late.tokens == fresh(0)[0]


def test_an_update_in_a_pause(local: LocalEngine, fresh: Any) -> None:
    running = local.submit(PROMPTS[0], GREEDY)
    local.step()
    tell(local, Pause("recompute"))
    waiting = local.submit(PROMPTS[1], GREEDY)
    update(local, 1, policy(1), "recompute")
    assert not local.engine.core.has_work and not waiting.deltas
    tell(local, Resume())
    local.finish()
    assert waiting.tokens == fresh(1)[1] and running.finish_reason == "length"
