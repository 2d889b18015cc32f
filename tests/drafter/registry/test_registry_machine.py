"""Any sequence of changes leaves the registry as a plain model of it says."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from slipstream.drafter.head import layout
from slipstream.drafter.head.layout import HeadConfig
from slipstream.drafter.registry.registry import Registry
from slipstream.drafter.registry.states import TransitionError

HEAD = HeadConfig(16, 16, 1, 1, 16, 32, 8, (1, 2, 3), 1e-5, {"rope_type": "default", "rope_theta": 1e4}, 64)
TENSORS = layout.random_tensors(HEAD, 0)
ROUTES = st.sampled_from(["", "acme"])


class RegistryMachine(RuleBasedStateMachine):
    versions = Bundle("versions")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="registry-"))
        self.registry = Registry(self.folder)
        self.states: dict[int, str] = {}
        self.routes: dict[int, str] = {}
        self.parents: dict[int, int | None] = {}
        self.pinned: set[int] = set()
        self.was_live: dict[str, list[int]] = {"": [], "acme": []}
        """Per route, in the order in which they became live, each once."""

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def in_state(self, state: str, route: str) -> int | None:
        found = [each for each, known in self.states.items() if known == state and self.routes[each] == route]
        assert len(found) < 2
        return found[0] if found else None

    def predecessor(self, route: str) -> int | None:
        retired = [each for each in self.was_live[route] if self.states[each] == "retired"]
        return retired[-1] if retired else None

    def go_live(self, version: int) -> None:
        self.states[version] = "live"
        order = self.was_live[self.routes[version]]
        order[:] = [each for each in order if each != version] + [version]

    def expect(self, legal: bool, change: Any, *arguments: Any) -> Any:
        if legal:
            return change(*arguments)
        with pytest.raises(TransitionError):
            change(*arguments)
        return None

    @rule(target=versions, route=ROUTES)
    def add_first(self, route: str) -> int:
        return self._add(route, None)

    @rule(target=versions, parent=versions)
    def add_child(self, parent: int) -> int:
        return self._add(self.routes[parent], parent)

    def _add(self, route: str, parent: int | None) -> int:
        version = self.registry.add(HEAD, TENSORS, target="A", origin="trained", route=route, parent=parent).version
        assert version > max(self.states, default=0)
        self.states[version], self.routes[version], self.parents[version] = "candidate", route, parent
        return version

    @rule(version=versions)
    def promote(self, version: int) -> None:
        legal = self.states[version] in ("candidate", "canary", "retired")
        self.expect(legal, self.registry.promote, version, "better")
        if legal:
            if (live := self.in_state("live", self.routes[version])) is not None:
                self.states[live] = "retired"
            self.go_live(version)

    @rule(version=versions)
    def start_canary(self, version: int) -> None:
        legal = self.states[version] in ("candidate", "retired") and not self.in_state("canary", self.routes[version])
        self.expect(legal, self.registry.start_canary, version)
        if legal:
            self.states[version] = "canary"

    @rule(version=versions)
    def retire(self, version: int) -> None:
        legal = self.states[version] in ("candidate", "canary", "live")
        self.expect(legal, self.registry.retire, version)
        if legal:
            self.states[version] = "retired"

    @rule(route=ROUTES)
    def roll_back(self, route: str) -> None:
        canary, live = self.in_state("canary", route), self.in_state("live", route)
        now = self.expect(bool(canary or live), self.registry.roll_back, route)
        if canary:
            self.states[canary] = "rolled-back"
        elif live:
            self.states[live] = "rolled-back"
            if (before := self.predecessor(route)) is not None:
                self.go_live(before)
        assert (now and now.version) == self.in_state("live", route)

    @rule(version=versions)
    def pin(self, version: int) -> None:
        legal = self.states[version] != "pruned"
        self.expect(legal, self.registry.pin, version)
        if legal:
            self.pinned.add(version)

    @rule(version=versions)
    def unpin(self, version: int) -> None:
        legal = self.states[version] != "pruned"
        self.expect(legal, self.registry.unpin, version)
        if legal:
            self.pinned.discard(version)

    @rule(keep=st.integers(0, 3))
    def prune(self, keep: int) -> None:
        expected = []
        for route in ("", "acme"):
            spared = self.pinned | {self.predecessor(route)}
            old = [
                each
                for each, state in self.states.items()
                if self.routes[each] == route and state in ("candidate", "retired", "rolled-back")
            ]
            expected += [each for each in old if each not in spared][::-1][keep:]
        assert self.registry.prune(keep) == sorted(expected)
        for version in expected:
            self.states[version] = "pruned"

    @rule()
    def reopen(self) -> None:
        self.registry = Registry(self.folder)

    @invariant()
    def is_what_the_model_says(self) -> None:
        found = self.registry.list(pruned=True)
        assert {each.version: each.state for each in found} == self.states
        assert {each.version: each.route for each in found} == self.routes
        assert {each.version: each.manifest.parent for each in found} == self.parents
        assert {each.version for each in found if each.pinned} == self.pinned
        for each in found:
            assert each.manifest.parent is None or each.manifest.parent < each.version  # so lineage has no circles
            assert each.manifest.version == each.version
        kept = {self.registry.path(each.version) for each in found if each.state != "pruned"}
        assert set((self.folder / "versions").iterdir()) == kept
        latest = {event.version: event.after for event in self.registry.history()}
        assert latest == self.states


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=15, stateful_step_count=25)
