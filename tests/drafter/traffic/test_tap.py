"""The tap on a real engine: what is kept is what the target computed, and keeping it holds nothing up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.traffic.recompute import Recompute, recompute
from slipstream.drafter.traffic.store import Sample, TrafficStore
from slipstream.drafter.traffic.tap import TrafficTap
from slipstream.drafter.traffic.writer import TrafficWriter
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.listening import EndedRequest
from slipstream.engine.messages import NewRequest, SamplingParams
from slipstream.engine.models.loader import load_model
from slipstream.engine.speculation.oracles import OracleDrafter
from slipstream.engine.speculation.protocol import Computed, DraftRow
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels.native.library import isa

TAPS = (2, 3)
"""Default ones of six layers: 2, 3 and 3."""
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
needs_native = pytest.mark.skipif(isa() is None, reason="no native kernels on this machine")


@pytest.fixture(scope="module")
def truth(config_for: Any) -> Callable[..., Sample]:
    """A sample as it should be, from the tokens alone, with another instance of the model."""
    models = {}

    def fill(sample: Sample, kernels: str = "native", dtype: str = "bfloat16") -> Sample:
        if (kernels, dtype) not in models:
            model = load_model(config_for(kernels=kernels, dtype=dtype)).model
            models[kernels, dtype] = Recompute(model, TAPS, 512, chunk=48)
        return recompute(dataclasses.replace(sample, features=None), models[kernels, dtype])

    return fill


def check(samples: Sequence[Sample], truth: Callable[..., Sample]) -> None:
    for sample in samples:
        assert sample.features is not None
        assert sample.features.dtype == torch.bfloat16 and sample.taps == TAPS
        whole = truth(sample).features
        assert whole is not None and len(whole) == len(sample.tokens) - 1
        assert sample.start + len(sample.features) == len(whole)
        assert torch.equal(sample.features, whole[sample.start :])


@needs_native
@pytest.mark.parametrize("pipeline", ["off", "on"])
def test_features_are_those_of_a_plain_forward_pass(
    tmp_path: Path,
    truth: Callable[..., Sample],
    pipeline: Literal["on", "off"],
    config_for: Any,
    tapped_engine: Any,
    prompts: Any,
) -> None:
    """Without speculation: chunked prompts, several streams, requests that end at different steps."""
    tapped = tapped_engine(tmp_path / "t", config_for(pipeline=pipeline))
    told = [tapped.submit(prompt, tenant=f"t{len(prompt)}", domain="d") for prompt in prompts(3, 20, 90, 41)]
    samples = tapped.samples()
    assert sorted(sample.tokens.tolist() for sample in samples) == sorted(
        prompt + completion.tokens for prompt, completion in zip(prompts(3, 20, 90, 41), told, strict=True)
    )
    check(samples, truth)
    for sample in samples:
        assert sample.start == 0 and sample.greedy and sample.domain == "d"
        assert sample.tenant == f"t{sample.num_prompt}"
        assert abs(sample.time - time.time()) < 60


@needs_native
@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_rejected_drafts_leave_nothing(
    tmp_path: Path, truth: Callable[..., Sample], right: float, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    asked = prompts(5, 17, 40)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5)
    plain = LocalEngine(config_for())
    answers = {tuple(p): c.tokens for p, c in zip(asked, plain.generate(asked, params), strict=True)}
    config = config_for(speculation_policy="fixed", max_draft_tokens=4)
    tapped = tapped_engine(tmp_path / "t", config, [OracleDrafter(answers, right)])
    for prompt in asked:
        # A stop token in the middle of what a step brings: nothing after it is kept.
        stop = last_new(answers[tuple(prompt)])
        tapped.submit(prompt, SamplingParams(max_tokens=60, temperature=1.0, seed=5, stop_token_ids=(stop,)))
    samples = tapped.samples()
    [stats] = tapped.local.engine.runner.speculator.stats
    assert stats.draft_tokens > 30 and (stats.accepted_tokens > 10) == (right > 0)
    assert len(samples) == 3
    check(samples, truth)
    for sample in samples:
        known = answers[tuple(sample.tokens[: sample.num_prompt].tolist())]
        assert sample.tokens[sample.num_prompt :].tolist() == known[: known.index(last_new(known)) + 1]


def last_new(answer: list[int]) -> int:
    """The token that comes latest for the first time."""
    return max(answer, key=answer.index)


@needs_native
def test_most_likely_tokens_belong_to_their_places(
    tmp_path: Path, truth: Callable[..., Sample], config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    """For greedy answers they begin with the answer, through chunks, draft tokens right and wrong, and penalties."""
    asked = prompts(5, 17, 40)
    params = SamplingParams(max_tokens=40, temperature=0.0, logprobs=3)
    plain = LocalEngine(config_for())
    told = {tuple(p): c for p, c in zip(asked, plain.generate(asked, params), strict=True)}
    oracle = OracleDrafter({prompt: completion.tokens for prompt, completion in told.items()}, 0.7)
    config = config_for(speculation_policy="fixed", max_draft_tokens=4)
    tapped = tapped_engine(tmp_path / "t", config, [oracle], top_k=3)
    for number, prompt in enumerate(asked):
        tapped.submit(prompt, params)
        tapped.submit(prompts(50 + number)[0], params, traffic="off")
    samples = tapped.samples()
    assert len(samples) == 3 and tapped.local.engine.runner.speculator.stats[0].draft_tokens > 30
    for sample in samples:
        deltas = told[tuple(sample.tokens[: sample.num_prompt].tolist())].deltas
        expected = [entry.top for delta in deltas for entry in delta.logprobs or ()]
        assert sample.topk is not None
        ids, logprobs = sample.topk
        assert ids.dtype == torch.int32 and logprobs.dtype == torch.float16
        assert ids.tolist() == [[token for token, _ in top] for top in expected]
        values = torch.tensor([[value for _, value in top] for top in expected])
        torch.testing.assert_close(logprobs.float(), values, rtol=2e-3, atol=2e-3)
        assert ids[:, 0].tolist() == sample.tokens[sample.num_prompt :].tolist()


@needs_native
def test_a_head_and_the_tap_see_the_same_layers(
    tmp_path: Path, truth: Callable[..., Sample], config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    seen: list[int] = []

    class Watching(HeadDrafter):
        def observe(self, computed: Any) -> None:
            seen.extend(entry.start for entry in computed)
            super().observe(computed)

    def load(decoder: Any) -> Any:
        head = layout.config_for(decoder, 48, taps=(1, 4, 6))
        return FirstHead(head, layout.random_tensors(head, 0))

    tapped = tapped_engine(tmp_path / "t", config_for(drafter="given"), [Watching(load)])
    tapped.submit(prompts(20)[0])
    tapped.submit(prompts(30)[0], traffic="off")
    [sample] = tapped.samples()
    assert sample.taps == (1, 4, 6) and len(sample.tokens) == 44 and len(seen) > 40
    other = Recompute(load_model(config_for()).model, (1, 4, 6), 64)
    assert sample.features is not None and torch.equal(sample.features, other.features(sample.tokens))


@needs_native
def test_prefix_hits_say_where_features_begin(
    tmp_path: Path, truth: Callable[..., Sample], config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for())
    [prompt] = prompts(70)
    tapped.submit(prompt, traffic="off")
    tapped.local.finish()
    second = tapped.submit([*prompt, 5, 6, 7])
    [sample] = tapped.samples()
    assert second.num_cached_tokens >= 64
    assert sample.start == second.num_cached_tokens
    assert sample.tokens[:70].tolist() == prompt
    check([sample], truth)


@needs_native
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_requests_are_whole(
    tmp_path: Path,
    truth: Callable[..., Sample],
    prefix_caching: bool,
    config_for: Any,
    tapped_engine: Any,
    prompts: Any,
) -> None:
    config = config_for(kv_cache_memory="256KiB", max_model_len=96, max_running=6, prefix_caching=prefix_caching)
    tapped = tapped_engine(tmp_path / "t", config)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=1)
    told = [tapped.submit(prompt, params) for prompt in prompts(20, 22, 24, 26, 28, 30)]
    samples = tapped.samples()
    assert sum(completion.num_preemptions for completion in told) >= 2
    assert len(samples) == 6 and not any(sample.greedy for sample in samples)
    assert sorted(sample.tokens[sample.num_prompt :].tolist() for sample in samples) == sorted(c.tokens for c in told)
    check(samples, truth)
    assert any(sample.start == 0 for sample in samples)


def test_what_is_aborted_is_not_kept_and_stop_strings_are_no_abort(
    tmp_path: Path, config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for())
    gone, stopped = (tapped.submit(prompt) for prompt in prompts(20, 30))
    for _ in range(8):
        tapped.local.step()
    tapped.local.engine.scheduler.abort([gone.request_id])
    tapped.local.engine.scheduler.abort([stopped.request_id], stopped=True)
    waiting = tapped.submit(prompts(12)[0])
    tapped.local.engine.scheduler.abort([waiting.request_id])
    [sample] = tapped.samples()
    assert sample.num_prompt == 30 and sample.tokens[30:].tolist() == stopped.tokens
    assert 0 < len(stopped.tokens) < 24
    assert tapped.writer.stats.dropped == 0


def test_levels(tmp_path: Path, config_for: Any, tapped_engine: Any, prompts: Any) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for())
    for prompt, level in zip(prompts(10, 11, 12), ("off", "tokens", "features"), strict=True):
        tapped.submit(prompt, traffic=level)
    samples = {sample.num_prompt: sample for sample in tapped.samples()}
    assert samples.keys() == {11, 12}
    assert samples[11].features is None and samples[11].start == len(samples[11].tokens)
    assert samples[12].features is not None
    tokens_only = tapped_engine(tmp_path / "u", config_for(), features=False)
    assert not tokens_only.local.engine.runner._taps, "nothing is read from the model"
    tokens_only.submit(prompts(10)[0], traffic="tokens")
    [sample] = tokens_only.samples()
    assert sample.features is None and len(sample.tokens) == 34


@needs_native
def test_long_requests_keep_the_features_of_their_end(
    tmp_path: Path, truth: Callable[..., Sample], config_for: Any, tapped_engine: Any, prompts: Any
) -> None:
    tapped = tapped_engine(tmp_path / "t", config_for(max_step_tokens=256), most_positions=100)
    for prompt in prompts(300, 90, 40):
        tapped.submit(prompt, SamplingParams(max_tokens=70, temperature=0.0))
    samples = tapped.samples()
    check(samples, truth)
    kept = {sample.num_prompt: len(sample.features) for sample in samples if sample.features is not None}
    assert kept == {300: 100, 90: 100, 40: 100}


def test_a_model_that_does_not_show_its_states_is_refused(tmp_path: Path, opaque: Path, tapped_engine: Any) -> None:
    config = EngineConfig(model=str(opaque), load_format="dummy", kv_cache_memory="4MiB")
    with pytest.raises(ConfigError, match="--traffic-log tokens"):
        tapped_engine(tmp_path / "t", config)


@pytest.mark.parametrize(("kernels", "dtype"), [("torch", "float32"), ("native", "float32")])
def test_recomputed_features_agree_with_other_kernels(
    tmp_path: Path,
    truth: Callable[..., Sample],
    kernels: Any,
    dtype: Any,
    config_for: Any,
    tapped_engine: Any,
    prompts: Any,
) -> None:
    if kernels == "native" and isa() is None:
        pytest.skip("no native kernels on this machine")
    tapped = tapped_engine(tmp_path / "t", config_for(kernels=kernels, dtype=dtype))
    tapped.submit(prompts(60)[0])
    [sample] = tapped.samples()
    whole = truth(sample, kernels, dtype)
    assert sample.features is not None and whole.features is not None
    torch.testing.assert_close(sample.features.float(), whole.features.float(), rtol=1e-2, atol=1e-2)
    assert recompute(whole, Recompute(load_model(config_for()).model, TAPS, 512)) is whole


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_users_of_one_model_see_the_layers_they_ask_for(kernels: str, config_for: Any, prompts: Any) -> None:
    if kernels == "native" and isa() is None:
        pytest.skip("no native kernels on this machine")
    shared = load_model(config_for(kernels=kernels)).model
    tokens = np.array(prompts(40)[0], np.int32)
    every = Recompute(shared, tuple(range(shared.shape.num_layers + 1)), 64)
    layers = [(0,), (1, shared.shape.num_layers), (2,)]
    users = [Recompute(shared, taps, 64) for taps in layers]
    for _ in range(2):  # in turn: what one asked for must not be what the next one gets
        whole = every.features(tokens)
        for taps, user in zip(layers, users, strict=True):
            assert torch.equal(user.features(tokens), whole[:, list(taps)])


@pytest.fixture(scope="module")
def model(config_for: Any) -> Any:
    return load_model(config_for(kernels="torch")).model


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_computed_twice_or_skipped_features_stay_in_place(
    tmp_path_factory: pytest.TempPathFactory, model: Any, data: st.DataObject
) -> None:
    """Rows of two requests in chunks, with preemptions after which the prefix cache knows more or less than before."""
    folder = tmp_path_factory.mktemp("any") / "t"
    most = data.draw(st.sampled_from([20, 100, 4096]))
    writer = TrafficWriter(lambda: TrafficStore(folder))
    tap = TrafficTap(writer, features=True, most_positions=most)
    tap.taps(model, ())
    total, begins = 200, {}
    for number in (1, 2):
        request = NewRequest(request_id=number, prompt=[1] * 5, params=GREEDY, traffic="features", tenant=str(number))
        tap.begin(request)
        row = DraftRow(0, "", 5, np.zeros(total, np.int32), total, frozenset(), request_id=number, traffic="features")
        entries = data.draw(st.lists(st.integers(0, total - 2), max_size=3), "where it enters a row")
        for attempt, begin in enumerate(entries or [0]):
            end = total - 1 if attempt == len(entries or [0]) - 1 else data.draw(st.integers(begin, total - 1))
            at = begin
            while at < end:
                count = min(data.draw(st.integers(1, 90)), end - at)
                values = (
                    torch.arange(at, at + count).float()[:, None, None].expand(count, len(TAPS), 64) + 1000 * number
                )
                tap.observe([Computed(row, at, values, range(count))])
                at += count
        begins[number] = entries[-1] if entries else 0
        tap.finish(EndedRequest(request, list(range(total)), "length", 0, 0))
    tap.close()
    store = TrafficStore(folder, create=False)
    for sample in store.samples():
        number = int(sample.tenant)
        assert sample.features is not None and sample.start <= max(begins[number], total - 1 - most)
        assert sample.start + len(sample.features) == total - 1 and len(sample.features) <= most
        expected = (torch.arange(sample.start, total - 1).float() + 1000 * number).bfloat16()
        assert bool((sample.features == expected[:, None, None]).all())
    assert writer.stats.kept == 2 and tap._pages.num_free == tap._pages.num_pages
    store.close()
