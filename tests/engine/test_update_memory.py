"""What updates of the target's weights take of memory; of a GPU's on a model of what torch and the driver say of it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from slipstream.engine.config import EngineConfig
from slipstream.engine.operations import BeginTargetUpdate, CancelTargetUpdate, FillTarget, FinishTargetUpdate
from slipstream.engine.target import update
from slipstream.engine.testing.local import LocalEngine, policy, write_policy


def test_updates_follow_each_other_where_there_is_room_for_two_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps what was freed of a GPU's memory, and so it is not free for whoever asks the driver."""
    known: dict[str, Any] = {"kv_cache_memory": "4MiB", "threads": 1, "speculation": "off"}
    local = LocalEngine(EngineConfig(model=str(write_policy(tmp_path / "policy", policy(0))), **known))
    target, model = local.engine._target, local.engine.loaded.model
    total, of_a_set = 5 << 29, 1 << 30
    reserved = of_a_set
    sets = weakref.WeakSet[Any]([model.weights])
    new_weights = model.new_weights

    def made() -> Any:
        nonlocal reserved
        sets.add(weights := new_weights())
        reserved = max(reserved, len(sets) * of_a_set)
        return weights

    def mem_get_info(device: Any) -> tuple[int, int]:
        return total - reserved, total

    def empty_cache() -> None:
        nonlocal reserved
        reserved = len(sets) * of_a_set

    monkeypatch.setattr(model, "new_weights", made)
    monkeypatch.setattr(target, "_device", torch.device("cuda"))
    monkeypatch.setattr(target, "_weights_bytes", of_a_set)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    for number in range(1, 6):
        local.operate(BeginTargetUpdate(number), FillTarget(number, save(policy(number))), FinishTargetUpdate(number))
        assert reserved == 2 * of_a_set
    local.close()


def test_weights_that_nobody_has_are_given_back_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is asked when they are free, and not before: it keeps most of what becomes free later."""
    known: dict[str, Any] = {"kv_cache_memory": "4MiB", "threads": 1, "speculation": "off"}
    local = LocalEngine(EngineConfig(model=str(write_policy(tmp_path / "policy", policy(0))), **known))
    model = local.engine.loaded.model
    sets, left = weakref.WeakSet[Any]([model.weights]), list[int]()
    new_weights = model.new_weights

    def made() -> Any:
        sets.add(weights := new_weights())
        return weights

    monkeypatch.setattr(model, "new_weights", made)
    monkeypatch.setattr(update, "give_back_free", lambda: left.append(len(sets)))
    local.operate(BeginTargetUpdate(1), FillTarget(1, save(policy(1))), FinishTargetUpdate(1))
    local.finish()
    assert left == [1]
    local.operate(BeginTargetUpdate(2), FillTarget(2, save(policy(2))), CancelTargetUpdate(2))
    local.finish()
    assert left == [1, 1]
    local.close()
