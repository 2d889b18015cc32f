"""An engine that gives memory back and takes it again: what it says afterwards, and what its drafters do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError, SlipstreamError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.operations import (
    BeginTargetUpdate,
    ChecksumTarget,
    FillTarget,
    FinishTargetUpdate,
    MemoryTag,
    Pause,
    ReadTarget,
    ReleaseMemory,
    Resume,
    ResumeMemory,
    SwapDrafter,
)
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
LONG = SamplingParams(max_tokens=100, temperature=0.0)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 40]
LEVELS: list[tuple[tuple[MemoryTag, ...], bool]] = [
    (("kv_cache",), True),
    (("weights",), True),
    (("weights",), False),
    (("kv_cache", "weights"), True),
    (("kv_cache", "weights"), False),
]


def cold_head(target: DecoderConfig) -> FirstHead:
    """Made of the model's last layer: some of what it drafts is right."""
    config = layout.config_for(target, POLICY["vocab_size"])
    last = layout.last_layer(policy(0).items(), target.shape.num_layers)
    found = layout.from_target(config, last, range(config.draft_vocab_size))
    return FirstHead(config, found, version=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policies") / "0", policy(0))


def engine(folder: Path, **fields: Any) -> LocalEngine:
    options: dict[str, Any] = {
        "kv_cache_memory": "4MiB",
        "max_running": 8,
        "dtype": "float32",
        "pipeline": "off",
        "threads": 1,
    }
    options |= {"speculation_policy": "fixed", "max_draft_tokens": 3}
    return LocalEngine(EngineConfig(model=str(folder), **(options | fields)), [HeadDrafter(cold_head, stop_below=0.0)])


@pytest.fixture
def local(folder: Path) -> Iterator[LocalEngine]:
    local = engine(folder)
    yield local
    local.close()


def said(local: LocalEngine) -> tuple[list[list[int]], int, set[int]]:
    """Answers, accepted draft tokens, and the versions of the drafter."""
    done = local.generate(PROMPTS, GREEDY)
    deltas = [delta for each in done for delta in each.deltas]
    accepted = sum(delta.num_accepted for delta in deltas)
    return [each.tokens for each in done], accepted, {delta.drafter_version for delta in deltas}


def test_weights_that_were_kept_are_discarded_by_a_deeper_sleep(folder: Path) -> None:
    local = engine(folder, kernels="native")
    before = said(local)
    everything: tuple[Any, ...] = ("kv_cache", "weights")
    for levels in ((True, False), (False, True), (True, True, False, False)):
        weights = weakref.ref(local.engine.loaded.model.weights)
        for keep in levels:
            local.operate(ReleaseMemory(everything, keep))
        gc.collect()
        assert weights() is None
        local.operate(ResumeMemory(everything))
        assert said(local)[:2] == before[:2]
    local.close()


@pytest.mark.parametrize(("kernels", "rounds"), [("native", 2), ("torch", 1)])
def test_every_level_repeated(folder: Path, kernels: str, rounds: int) -> None:
    local = engine(folder, kernels=kernels)
    before = said(local)
    assert before[1] > 0 and 5 in before[2]
    sizes = [cache.num_bytes for cache in local.engine.runner.caches]
    assert len(sizes) == 2 and min(sizes) > 0
    for _ in range(rounds):
        for tags, keep in LEVELS:
            weights = weakref.ref(local.engine.loaded.model.weights)
            local.operate(ReleaseMemory(tags, keep))
            gc.collect()
            assert (weights() is None) == ("weights" in tags and not keep)
            left = [cache.num_bytes for cache in local.engine.runner.caches]
            assert left == ([0, 0] if "kv_cache" in tags else sizes)
            stats = local.engine.core.stats()
            assert set(stats.released) == set(tags) and stats.is_still and not stats.is_paused
            late = local.submit(PROMPTS[0], GREEDY)
            assert not local.engine.core.has_work
            for tag in tags:  # one after the other
                assert not local.engine.core.has_work
                local.operate(ResumeMemory((tag,)))
            local.finish()
            assert late.tokens == before[0][0]
            local.operate(ReleaseMemory(("kv_cache",)), ResumeMemory(("kv_cache",)))  # without what it has just said
            assert said(local) == before
            assert [cache.num_bytes for cache in local.engine.runner.caches] == sizes
    local.close()


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize(("tags", "keep"), LEVELS)
def test_requests_go_on_afterwards_or_end(folder: Path, tags: tuple[MemoryTag, ...], keep: bool, abort: bool) -> None:
    local = engine(folder)
    expected = [done.tokens for done in local.generate(PROMPTS, LONG)]
    running = [local.submit(prompt, LONG) for prompt in PROMPTS]
    for _ in range(6):
        local.step()
    local.operate(ReleaseMemory(tags, keep, abort))
    local.operate(ResumeMemory(tags))
    local.finish()
    for tokens, done in zip(expected, running, strict=True):
        assert done.tokens == tokens[: len(done.tokens)] and done.tokens
        assert done.finish_reason == ("abort" if abort else "length") and (abort or done.tokens == tokens)
    local.close()


def test_measuring_steps_leaves_no_memory_in_the_cache(local: LocalEngine) -> None:
    memory = local.engine.runner.cache.memory  # type: ignore[attr-defined]  # of the CPU's caches
    assert memory.numel() and not memory.any()


def test_a_pause_outlasts_a_sleep(local: LocalEngine) -> None:
    running = local.submit(PROMPTS[0], LONG)
    local.step()
    local.operate(Pause("keep"), ReleaseMemory(("kv_cache", "weights"), False))
    local.operate(ResumeMemory(("kv_cache", "weights")))
    assert local.engine.core.stats().is_paused and not local.engine.core.has_work
    local.operate(Resume())
    local.finish()
    assert running.finish_reason == "length"


def test_discarded_weights_come_back_with_an_update(local: LocalEngine, folder: Path) -> None:
    other = engine(write_policy(folder.parent / "1", policy(1)))
    expected = said(other)[0]
    other.close()
    local.operate(ReleaseMemory(("kv_cache", "weights"), False))
    with pytest.raises(ModelError, match="were discarded"):
        local.operate(ChecksumTarget())
    with pytest.raises(ModelError, match="were discarded"):
        local.operate(BeginTargetUpdate(3), FillTarget(3, save({"model.norm.weight": policy(1)["model.norm.weight"]})))
        local.operate(FinishTargetUpdate(3, keep_rest=True))
    with pytest.raises(SlipstreamError, match="drafters are swapped once"):
        local.operate(SwapDrafter(6, "", "anywhere"))
    # A trainer that always says that the rest is to stay as it is has sent everything: nothing is lacking.
    local.operate(BeginTargetUpdate(4), FillTarget(4, save(policy(1))), FinishTargetUpdate(4, keep_rest=True))
    assert not local.engine.core.has_work
    local.operate(ResumeMemory(("weights", "kv_cache")))
    answers, _, versions = said(local)
    assert answers == expected and 5 in versions
    assert local.stats.target_version == 4


def test_an_update_is_lost_with_the_weights_unless_they_are_kept(local: LocalEngine, folder: Path) -> None:
    files = said(local)[0]
    local.operate(BeginTargetUpdate(1), FillTarget(1, save(policy(1))), FinishTargetUpdate(1))
    updated = said(local)[0]
    assert updated != files
    for keep, expected, version in ((True, updated, 1), (False, files, 0)):
        local.operate(ReleaseMemory(("weights",), keep), ResumeMemory(("weights",)))
        assert said(local)[0] == expected and local.stats.target_version == version


def test_a_lora_that_comes_after_a_sleep_is_added_to_what_served_before_any(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checksums(sleeps: bool, *seeds: int) -> Any:
        local = engine(folder)
        for seed in seeds:
            torch.manual_seed(seed)
            name = "model.layers.0.self_attn.o_proj"
            pair = {f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(64, 2)}
            local.operate(BeginTargetUpdate(seed), FillTarget(seed, save(pair)))
            local.operate(FinishTargetUpdate(seed, lora_scale=1.0))
            if sleeps:
                with monkeypatch.context() as on_a_gpu:  # where weights move to the memory of the host
                    on_a_gpu.setattr(local.engine.runner.cache, "device", torch.device("cuda"))
                    local.operate(ReleaseMemory(("weights",)))
                local.operate(ResumeMemory(("weights",)))
        found = local.operate(ChecksumTarget()).by_name
        local.close()
        return found

    assert checksums(True, 1, 2) == checksums(False, 1, 2) == checksums(False, 2) != checksums(False, 1)


def test_files_that_are_gone_leave_it_asleep(tmp_path: Path) -> None:
    local = engine(write_policy(tmp_path / "model", policy(0)))
    expected = said(local)
    local.operate(ReleaseMemory(("weights",), False))
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ModelError, match="no weights"):
        local.operate(ResumeMemory(("weights",)))
    late = local.submit(PROMPTS[0], GREEDY)
    assert not local.engine.core.has_work and local.engine.core.stats().released == ("weights",)
    (tmp_path / "away").rename(tmp_path / "model" / "model.safetensors")
    local.operate(ResumeMemory(("weights",)))
    local.finish()
    assert late.tokens == expected[0][0]
    local.close()


def test_a_model_that_runs_through_transformers_sleeps_too(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", vocab_size=64, max_position_embeddings=128, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    local = LocalEngine(EngineConfig(model=str(tmp_path), kv_cache_memory="4MiB", dtype="float32", threads=1))
    before = [done.tokens for done in local.generate(PROMPTS, GREEDY)]
    for tags, keep in LEVELS[-2:]:
        local.operate(ReleaseMemory(tags, keep), ResumeMemory(tags))
        assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == before
    local.operate(ReleaseMemory(("weights",), False))
    local.operate(BeginTargetUpdate(1), ReadTarget(1, str(tmp_path)), FinishTargetUpdate(1))
    local.operate(ResumeMemory(("weights",)))
    assert [done.tokens for done in local.generate(PROMPTS, GREEDY)] == before
    local.close()
