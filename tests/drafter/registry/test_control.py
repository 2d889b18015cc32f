"""One decides for a registry, whatever becomes of the others, and also where a lock on a file keeps nobody out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.registry import control
from slipstream.drafter.registry.control import Control
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import NotInControlError
from tests.forking import Forks

HOLD = """
import sys
from slipstream.drafter.registry.control import Control
from slipstream.drafter.registry.registry import Registry
held = Control(Registry(sys.argv[1]))
print(held.take() is not None and held.epoch, flush=True)
sys.stdin.read()
"""


def test_one_is_in_control_and_the_next_takes_over_when_it_ends(registry: Registry, forks: Forks) -> None:
    ours = Control(registry)
    with forks.start(HOLD, str(registry.folder)) as other:
        assert other.stdout.readline() == "1\n"
        for _ in range(2):
            assert ours.take() is None and ours.epoch == 1
        other.kill()  # it says nothing at its end
    assert ours.take() is not None and ours.epoch == 2
    assert Control(registry).take() is None
    ours.release()
    assert Control(Registry(registry.folder)).take() is not None


def test_where_locks_keep_nobody_out_the_one_before_changes_nothing_any_more(
    registry: Registry, make_head: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control.fcntl, "flock", lambda file, how: None)
    version = registry.add(*make_head(0), target="sha256:1", origin="trained").version
    first, second = Control(registry), Control(registry)
    before = first.take()
    assert before is not None
    before.start_canary(version)
    now = second.take()
    assert now is not None and second.epoch > first.epoch
    changes: list[Callable[[Registry], Any]] = [
        lambda registry: registry.promote(version),
        lambda registry: registry.roll_back(version=version),
        lambda registry: registry.retire(version),
        lambda registry: registry.record_metrics(version, {"trial": 0}),
        lambda registry: registry.pin(version),
        lambda registry: registry.prune(0),
        lambda registry: registry.add(*make_head(1), target="sha256:1", origin="trained"),
    ]
    for change in changes:
        with pytest.raises(NotInControlError, match="another server has taken control"):
            change(before)
    assert before.get(version) == registry.get(version) and registry.get(version).state == "canary"
    first.lose()
    assert first.take() is None, "or they would take it from each other for ever"
    assert now.promote(version).state == "live"
    assert registry.retire(version).state == "retired", "people decide whoever is in control"


@given(st.lists(st.sampled_from(["take 0", "take 1", "take 2", "release 0", "release 1", "release 2"]), max_size=20))
def test_whoever_took_control_last_has_the_highest_epoch(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str]
) -> None:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    servers = [Control(registry) for _ in range(3)]
    holder: int | None = None
    highest = 0
    for action, number in (each.split() for each in actions):
        server = servers[int(number)]
        if action == "take":
            taken = server.take()
            assert (taken is not None) == (holder in (None, int(number)))
            if taken is not None and holder is None:
                assert server.epoch == highest + 1
                holder, highest = int(number), server.epoch
            assert server.epoch == highest
        else:
            server.release()
            holder = None if holder == int(number) else holder
