"""Versions of a head come and go while it drafts: nothing but the speed of an answer may show it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.registry.exchange import import_head
from slipstream.drafter.registry.fingerprint import served_fingerprint
from slipstream.drafter.registry.registry import Registry
from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError, MisfitError, ModelError, SlipstreamError, SupersededError
from slipstream.engine.messages import DrafterStats, SamplingParams, TokenDelta
from slipstream.engine.models.config import decoder_config
from slipstream.engine.operations import DropDrafter, SwapDrafter, SwapReport
from slipstream.engine.testing.local import TINY_LLAMA, Completion, LocalEngine, policy, write_policy
from slipstream.kernels.native.library import isa

TARGET = TINY_LLAMA | {"max_position_embeddings": 512, "tie_word_embeddings": True}
KERNELS = ["torch", *(["native"] if isa() else [])]


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small weights and tied embeddings: it repeats the last token, which its own last layer sees coming."""
    return write_policy(tmp_path_factory.mktemp("echo"), policy(0, TARGET, 1), TARGET)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large weights: what it says depends on everything before."""
    return write_policy(tmp_path_factory.mktemp("lively"), policy(0, TARGET, 8), TARGET)


@pytest.fixture(scope="module")
def heads(echo: Path, lively: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: cold heads of both targets, and random ones."""
    folder = tmp_path_factory.mktemp("heads")
    target = decoder_config(TARGET)
    config = layout.config_for(target, 96)
    for name, model in (("echo", echo), ("lively", lively)):
        parameters = layout.last_layer(open_checkpoint(model).tensors(), 4)
        layout.write(folder / name, config, layout.from_target(config, parameters, range(96)))
    for seed in range(3):
        layout.write(folder / f"random{seed}", config, layout.random_tensors(config, seed))
    return {path.name: path for path in folder.iterdir()}


def local_engine(model: Path, kernels: str = "auto", head: str = "cold", **fields: Any) -> LocalEngine:
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": "16MiB", "speculation_policy": "fixed"}
    options |= {"max_draft_tokens": 3, "speculation": "head", "drafter": head, "max_step_tokens": 4096, "threads": 1}
    config = EngineConfig(model=str(model), kernels=kernels, **(options | fields))  # type: ignore[arg-type]
    return LocalEngine(config, make_drafters(config))


def swap(local: LocalEngine, version: int, path: Path, route: str = "") -> Any:
    """Between the steps of whatever runs, but to its end."""
    done = local.engine.operate(SwapDrafter(version, route, str(path)))
    return wait(local, done)


def wait(local: LocalEngine, done: Any) -> Any:
    deadline = time.monotonic() + 300
    while not done.done():
        assert time.monotonic() < deadline
        local.step() if local.engine.core.has_work else local.engine.poll()
        time.sleep(0.001)
    return done.result()


def head_stats(local: LocalEngine) -> DrafterStats:
    [stats] = [entry for entry in local.engine.runner.speculator.stats if entry.name == "head"]
    return stats


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 96, rng.integers(3, 60)).tolist() for _ in range(count)]


GREEDY = SamplingParams(max_tokens=60, temperature=0.0)


@pytest.mark.parametrize(("kernels", "streams"), [(kernels, 4 if kernels == "torch" else 32) for kernels in KERNELS])
def test_fifty_swaps_under_load_do_not_show(lively: Path, heads: dict[str, Path], kernels: str, streams: int) -> None:
    local = local_engine(lively, kernels)
    texts = prompts(400)
    files = [heads[name] for name in ("lively", "random0", "random1", "random2")]
    order: list[TokenDelta] = []
    deliver = local._deliver
    local.engine.core._deliver = lambda deltas, stats: (order.extend(deltas), deliver(deltas, stats))[1]
    landed: list[SwapReport] = []
    version = 1
    done = None
    while len(landed) < 50 or local.engine.core.has_work:
        if done is not None and done.done():
            landed.append(done.result())
            done = None
        if done is None and len(landed) < 50:
            version += 1
            done = local.engine.operate(SwapDrafter(version, "", str(files[version % 4])))
        while len(landed) < 50 and sum(c.finish_reason is None for c in local.completions.values()) < streams:
            local.submit(texts[len(local.completions) % len(texts)], GREEDY)
        local.step()
    local.engine.scheduler.check_integrity()
    assert [entry.version for entry in landed] == list(range(2, 52))
    versions = [delta.drafter_version for delta in order if delta.num_drafted]
    assert versions == sorted(versions) and len(set(versions)) >= 25 and versions[-1] <= 51
    assert all(completion.finish_reason == "length" for completion in local.completions.values())
    assert head_stats(local).swaps == 50 and head_stats(local).routes == {"": 51}

    plain = local_engine(lively, kernels, speculation="off")
    expected = plain.generate(texts[: len(local.completions)], GREEDY)
    answers = {tuple(text): completion.tokens for text, completion in zip(texts, expected, strict=False)}
    for request_id, completion in local.completions.items():
        assert completion.tokens == answers[tuple(texts[(request_id - 1) % len(texts)])]


def accept_rate(completions: list[Completion]) -> dict[int, float]:
    """Accepted draft tokens among those verified, by version."""
    deltas = [delta for completion in completions for delta in completion.deltas if delta.num_drafted]
    return {
        version: sum(delta.num_accepted for delta in deltas if delta.drafter_version == version)
        / sum(delta.num_drafted for delta in deltas if delta.drafter_version == version)
        for version in {delta.drafter_version for delta in deltas}
    }


@pytest.mark.parametrize("kernels", KERNELS)
def test_acceptance_falls_with_a_random_head_and_comes_back(echo: Path, heads: dict[str, Path], kernels: str) -> None:
    local = local_engine(echo, kernels)
    params = SamplingParams(max_tokens=250, temperature=0.0)
    streams = [local.submit(text, params) for text in prompts(2)]
    for version, head in ((2, "random0"), (3, "echo")):
        for _ in range(15):
            local.step()
        swap(local, version, heads[head])
    local.finish()
    rates = accept_rate(streams)
    assert rates[1] > 0.9 and rates[2] < 0.2 and rates[3] > 0.9
    assert [entry.version for entry in head_stats(local).versions] == [3]


def test_routes_hold_versions_of_their_own(echo: Path, heads: dict[str, Path]) -> None:
    local = local_engine(echo, max_drafters=3)
    alone = head_stats(local).memory_bytes
    swap(local, 7, heads["random0"], route="canary")
    swap(local, 8, heads["echo"], route="tenant")
    assert head_stats(local).memory_bytes == 3 * alone > 0
    with pytest.raises(SlipstreamError, match=r"3 drafters are loaded.*--max-drafters"):
        swap(local, 9, heads["echo"], route="domain")

    def rates(*routes: str) -> dict[str, dict[int, float]]:
        streams = {route: local.submit(prompts(1)[0], GREEDY, route=route) for route in routes}
        local.finish()
        return {route: accept_rate([stream]) for route, stream in streams.items()}

    found = rates("", "canary", "tenant", "nobody")
    assert [list(versions) for versions in found.values()] == [[1], [7], [8], [1]]
    assert found["canary"][7] < 0.2 and min(found[""][1], found["tenant"][8], found["nobody"][1]) > 0.9
    versions = {entry.version: entry for entry in head_stats(local).versions}
    assert versions[7].drafts > 10 * versions[7].accepted_tokens
    assert versions[8].accepted_tokens > 0.9 * versions[8].draft_tokens > 0

    wait(local, local.engine.operate(DropDrafter("canary")))
    assert head_stats(local).routes == {"": 1, "tenant": 8} and head_stats(local).memory_bytes == 2 * alone
    assert list(rates("canary")["canary"]) == [1]
    with pytest.raises(ConfigError, match="'canary' holds no drafter; loaded are the routes '', 'tenant'"):
        local.engine.operate(DropDrafter("canary"))
    swap(local, 9, heads["echo"], route="domain")


@pytest.mark.parametrize("route", ["canary", "tenant:a"])
def test_a_version_of_its_own_route_sees_the_whole_context(lively: Path, heads: dict[str, Path], route: str) -> None:
    """On trial it would otherwise be judged by how many beginnings of prompts others had computed before."""
    local = local_engine(lively, max_draft_tokens=1)
    same, other = heads["lively"], heads["random0"]
    beginning = prompts(30)[-1] * 3
    texts = [beginning + text for text in prompts(8)]

    def ask(route: str) -> tuple[list[list[int]], list[list[bool]], list[int]]:
        """Answers, which first draft tokens were right, how much came from the cache."""
        asked = []
        for text in (beginning, *texts):  # one at a time: what shares a step decides how numbers are rounded
            asked.append(local.submit(text, GREEDY, route=route))
            local.finish()
        right = [[delta.first_right for delta in each.deltas if delta.num_drafted] for each in asked]
        return [each.tokens for each in asked], right, [each.deltas[-1].num_cached_tokens for each in asked]

    answers, right, cached = ask("")
    assert cached[0] == 0 < min(cached[1:]) and 0.1 < np.mean(np.concatenate(right)) < 0.9
    for version, head in ((2, same), (3, other), (4, same)):
        swap(local, version, head, route)
        told, found, fresh = ask(route)
        told_again, _, again = ask(route)
        assert told == told_again == answers
        assert (found == right) == (head == same), "it drafts like the same head that was there from the beginning"
        assert fresh == cached and min(again) > 0, "a prefix is computed once per version"
    assert min(ask("nobody")[2]) > 0, "without a version of its own, a route shares what all have computed"


def test_what_is_in_memory_goes_live_at_once(echo: Path, heads: dict[str, Path], tmp_path: Path) -> None:
    """Back to the version before, from trial to all requests, to none and back: no file is read, no thread asked."""
    local = local_engine(echo)
    params = SamplingParams(max_tokens=400, temperature=0.0)
    stream = local.submit([1, 2, 3], params)
    paths = {version: tmp_path / str(version) for version in (2, 3, 4)}
    for version, path in paths.items():
        shutil.copytree(heads["random0" if version == 3 else "echo"], path)

    def drafted_by() -> set[int]:
        local.step()  # with draft tokens from before
        before = len(stream.deltas)
        for _ in range(6):
            local.step()
        return {delta.drafter_version for delta in stream.deltas[before:] if delta.num_drafted}

    def at_once(version: int) -> None:
        done = local.engine.operate(SwapDrafter(version, "", str(paths[version])))
        assert done.done() and done.result().version == version
        assert head_stats(local).routes[""] == version and drafted_by() <= {version}

    swap(local, 2, paths[2])
    swap(local, 3, paths[3])
    swap(local, 4, paths[4], route="canary")
    shutil.rmtree(tmp_path)
    at_once(2)
    at_once(4)
    at_once(3)
    # Version 2 can be gone back to after these, too: there is memory for two versions on each of two routes.
    at_once(2)
    local.engine.operate(DropDrafter("canary")).result()
    at_once(2)
    local.engine.operate(DropDrafter("")).result()
    assert head_stats(local).routes == {} and drafted_by() == set()
    at_once(2)
    assert 2 in drafted_by()
    at_once(4)
    with pytest.raises(ModelError, match="is no drafter"):  # there was memory for the two that were held last
        swap(local, 3, paths[3])
    local.finish()
    [plain] = local_engine(echo, speculation="off").generate([[1, 2, 3]], params)
    assert stream.tokens == plain.tokens


def test_a_later_decision_counts_and_an_earlier_one_says_so(echo: Path, heads: dict[str, Path]) -> None:
    local = local_engine(echo)
    stream = local.submit([1, 2, 3], SamplingParams(max_tokens=400, temperature=0.0))
    local.step()
    futures = [local.engine.operate(SwapDrafter(version, "", str(heads["random0"]))) for version in range(2, 10)]
    assert wait(local, futures[-1]).version == 9
    assert all(isinstance(future.exception(), SupersededError) for future in futures[:-1])
    coming = local.engine.operate(SwapDrafter(10, "canary", str(heads["echo"])))
    local.engine.operate(DropDrafter("canary")).result()
    assert isinstance(coming.exception(), SupersededError)
    local.finish()
    assert head_stats(local).routes == {"": 9} and head_stats(local).swaps == 1
    assert {delta.drafter_version for delta in stream.deltas if delta.num_drafted} <= {1, 9}


def test_a_route_can_come_and_go_in_mid_answer(lively: Path, heads: dict[str, Path]) -> None:
    local = local_engine(lively)
    stream = local.submit([1, 2, 3], SamplingParams(max_tokens=300, temperature=0.0), route="canary")
    _ = [local.step() for _ in range(5)]
    for version in (5, 6):
        swap(local, version, heads["lively"], route="canary")
        for _ in range(5):
            local.step()
        wait(local, local.engine.operate(DropDrafter("canary")))
        for _ in range(5):
            local.step()
    local.finish()
    seen = [delta.drafter_version for delta in stream.deltas if delta.num_drafted]
    assert [version for i, version in enumerate(seen) if i == 0 or seen[i - 1] != version] == [1, 5, 1, 6, 1]
    [plain] = local_engine(lively, speculation="off").generate(
        [[1, 2, 3]], SamplingParams(max_tokens=300, temperature=0.0)
    )
    assert stream.tokens == plain.tokens


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return spoil


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"][3, 3] = torch.inf
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is no drafter"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is no drafter"),
        (cut, "damaged"),
        (not_finite, "not finite"),
        (spoil_config(draft_vocab_size=48), "shape"),
        (spoil_config(vocab_size=48), "shape"),
        (spoil_config(eagle_aux_hidden_state_layer_ids=[0, 3]), r"its taps is \(0, 3\)"),
        (spoil_config(rms_norm_eps=0.5), "its norm_eps is 0.5"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_live_head_goes_on(
    echo: Path, heads: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(heads["random0"], tmp_path / "bad")
    spoil(tmp_path / "bad")
    local = local_engine(echo)
    stream = local.submit([1, 2, 3], SamplingParams(max_tokens=200, temperature=0.0))
    for route in ("", "canary"):
        with pytest.raises(ModelError, match=message):
            swap(local, 2, tmp_path / "bad", route)
    local.finish()
    assert head_stats(local).routes == {"": 1} and head_stats(local).swaps == 0
    rates = accept_rate([stream])
    assert rates.keys() == {1} and rates[1] > 0.9


def test_versions_count_from_one(echo: Path, heads: dict[str, Path]) -> None:
    local = local_engine(echo)
    with pytest.raises(ConfigError, match="from 1 on, not 0"):
        swap(local, 0, heads["echo"])
    without = local_engine(echo, speculation="ngram")
    with pytest.raises(SlipstreamError, match="--drafter"):
        swap(without, 2, heads["echo"])


def test_versions_of_a_registry_are_checked_against_the_served_model(
    echo: Path, lively: Path, heads: dict[str, Path], tmp_path: Path
) -> None:
    fingerprints = [served_fingerprint(EngineConfig(model=str(model))) for model in (echo, lively)]
    assert fingerprints[0] != fingerprints[1]
    registry = Registry(tmp_path)
    config, tensors = layout.read(heads["echo"], decoder_config(TARGET))
    own, foreign, broken = (
        registry.add(config, tensors, target=fingerprint, origin="trained").version
        for fingerprint in (fingerprints[0], fingerprints[1], fingerprints[0])
    )
    weights = next(registry.path(broken).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    local = local_engine(echo, head=str(registry.path(own)))
    assert head_stats(local).routes == {"": own}
    for version, message in ((foreign, "fingerprint"), (broken, "truncated")):
        with pytest.raises(ModelError, match=message):
            swap(local, version, registry.path(version))
    assert head_stats(local).routes == {"": own}
    swap(local, own, registry.path(own), route="tenant:acme")
    assert head_stats(local).routes == {"": own, "tenant:acme": own}


def test_a_version_of_a_lineage_is_served_where_that_lineage_is(
    echo: Path, heads: dict[str, Path], tmp_path: Path
) -> None:
    registry = Registry(tmp_path)
    lineages = ("", "run 7", "run 8")
    checkpoint = open_checkpoint(echo)
    versions = {
        lineage: import_head(registry, heads["echo"], checkpoint, lineage=lineage).version for lineage in lineages
    }
    for served in lineages:
        own = versions[served]
        local = local_engine(echo, head=str(registry.path(own)), target_lineage=served)
        assert head_stats(local).routes == {"": own}
        for lineage in set(lineages) - {served}:
            version = versions[lineage]
            with pytest.raises(MisfitError, match=f"version {version} does not fit the model") as caught:
                swap(local, version, registry.path(version))
            for name in filter(None, (lineage, served)):
                assert f"lineage '{name}'" in str(caught.value)
        assert head_stats(local).routes == {"": own}
