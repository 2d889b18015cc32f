"""Many updates of the target under load, in every mode of a pause, with weights whose tokens tell their version."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
from safetensors.torch import save

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import (
    BeginTargetUpdate,
    CancelTargetUpdate,
    FillTarget,
    FinishTargetUpdate,
    Pause,
    PauseMode,
    Resume,
    UpdateMode,
)
from slipstream.engine.testing.local import POLICY, Completion, LocalEngine, telling_policy, write_policy

SIZE = POLICY["vocab_size"]
SHARED = [1, 2, 3, 4] * 8
"""Two whole blocks that all prompts begin with."""


def engine(folder: Path, **fields: Any) -> LocalEngine:
    options: dict[str, Any] = {"kv_cache_memory": "2MiB", "max_running": 6, "dtype": "float32", "threads": 1}
    return LocalEngine(EngineConfig(model=str(folder), **(options | {"pipeline": "off"} | fields)))


def submit(local: LocalEngine, rng: Random) -> Completion:
    params = SamplingParams(max_tokens=rng.randrange(1, 40), temperature=0.0, logprobs=0)
    return local.submit([*SHARED, *(rng.randrange(SIZE) for _ in range(rng.randrange(1, 20)))], params)


def check(done: Completion, certain: float, kept: bool) -> None:
    """Every token tells the version that its delta tells.

    Where all that a token reads was computed by one version, it is as likely as ever: always, unless the request ran
    across an update that kept it (``kept``).
    """
    versions = [delta.target_version for delta in done.deltas for _ in delta.tokens]
    assert done.tokens == [version % SIZE for version in versions]
    assert versions == sorted(versions)
    logprobs = [entry.logprob for delta in done.deltas for entry in delta.logprobs or ()]
    assert len(logprobs) == len(done.tokens)
    for version, logprob in zip(versions, logprobs, strict=True):
        if not kept or version == versions[0]:
            assert logprob == pytest.approx(certain, abs=2e-6), "something that another version computed was read"


def run(folder: Path, pause: PauseMode, update: UpdateMode, updates: int, **fields: Any) -> None:
    local, rng = engine(folder, **fields), Random(0)
    local.generate([SHARED], SamplingParams(max_tokens=3, temperature=0.0, logprobs=0))
    [first] = local.completions.values()
    [certain, *_] = [entry.logprob for delta in first.deltas for entry in delta.logprobs or ()]
    asked, seen = [], weakref.WeakSet[Any]()
    for version in range(1, updates + 1):
        asked += [submit(local, rng) for _ in range(4)]
        for _ in range(rng.randrange(1, 6)):
            local.step()
        if version % 3 == 0:  # one that comes half way only
            half = dict(list(telling_policy(version + 1).items())[::2])
            local.operate(BeginTargetUpdate(version, update), FillTarget(version, save(half)))
            with pytest.raises(ModelError, match="lacks"):
                local.operate(FinishTargetUpdate(version))
            local.operate(CancelTargetUpdate(version))
        local.operate(BeginTargetUpdate(version, update), FillTarget(version, save(telling_policy(version))))
        local.operate(Pause(pause))
        asked.append(submit(local, rng))
        while local.engine.core.has_work:  # those that a pause waits for
            local.step()
        local.operate(FinishTargetUpdate(version), Resume())
        seen.add(local.engine.loaded.model.weights)
    local.finish()
    for done in asked:
        check(done, certain, kept=pause == update == "keep")
        assert done.finish_reason in ("length", "abort")
    versions = {delta.target_version for done in asked for delta in done.deltas if delta.tokens}
    assert len(versions) > updates / 2
    mixed = [done for done in asked if len({delta.target_version for delta in done.deltas if delta.tokens}) > 1]
    assert bool(mixed) == (pause in ("keep", "recompute") and update != "abort")
    gc.collect()
    assert len(seen) == 1 and local.engine.scheduler.kv.pool.num_used == 0
    local.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("telling") / "0", telling_policy(0))


@pytest.mark.parametrize("pause", get_args(PauseMode))
def test_no_token_comes_of_a_mix_of_weights(folder: Path, pause: PauseMode) -> None:
    run(folder, pause, "keep", 8)


@pytest.mark.slow
@pytest.mark.parametrize("pause", get_args(PauseMode))
@pytest.mark.parametrize("update", get_args(UpdateMode))
@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_hundred_updates(folder: Path, pause: PauseMode, update: UpdateMode, pipeline: str) -> None:
    run(folder, pause, update, 100, pipeline=pipeline)


def test_weights_of_several_versions_would_be_noticed(tmp_path: Path) -> None:
    """A tensor of another version changes the token, or how likely it is: the test above can fail."""
    certain = None
    for name in ("", "model.embed_tokens.weight", "lm_head.weight", *_projections()):
        local = engine(write_policy(tmp_path / (name or "plain"), telling_policy(5) | _other(name)))
        [done] = local.generate([SHARED], SamplingParams(max_tokens=1, temperature=0.0, logprobs=0))
        [entry] = done.deltas[-1].logprobs or ()
        certain = entry.logprob if certain is None else certain
        sound = done.tokens == [5] and abs(entry.logprob - certain) < 2e-6
        assert sound == (not name), name
        local.close()


def _projections() -> list[str]:
    return [name for name in telling_policy(0) if name.endswith(("v_proj.weight", "o_proj.weight"))][:2]


def _other(name: str) -> dict[str, Any]:
    return {name: telling_policy(6)[name]} if name else {}
