"""The whole engine on Triton's kernels, which run on the CPU here: the tokens of torch's, by few copies."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import bf16_interpreter  # noqa: F401  (mends the interpreter)
from recorded_graph import HostTraffic, RecordedGraph

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ConfigError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models import loader
from slipstream.engine.runner.warming import warm_up
from slipstream.engine.scheduling import calibration
from slipstream.engine.testing.local import POLICY, LocalEngine, policy, write_policy
from slipstream.kernels import ops
from slipstream.kernels.triton import graphs, launch

pytestmark = [
    pytest.mark.skipif(not launch.is_interpreted(), reason="tests marked gpu do this where there is one"),
]
HEAD = {"speculation": "head", "drafter": "cold"}
MADE: list[RecordedGraph] = []
PROMPTS = [[5, 9, 5, 9, 5, 9, 5], [40, 41, 3]]


@pytest.fixture(autouse=True)
def _least_calibration(quick_engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token: those of sixteen would take longer than all that is asked of an engine here."""
    monkeypatch.setattr(calibration, "PROFILE_TOKENS", (1,))
    monkeypatch.setattr(calibration, "PROBE_CONTEXT", 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 64}
    config |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def engine(tiny: str, kernels: Any, **options: Any) -> LocalEngine:
    fields = {"load_format": "dummy", "device": "cpu", "dtype": "float32", "kv_cache_memory": "256KiB", "threads": 1}
    config = EngineConfig(model=tiny, kernels=kernels, **(fields | options))
    return LocalEngine(config, make_drafters(config) if options.get("speculation") else ())


def answers(made: LocalEngine) -> list[list[int]]:
    greedy, drawn = SamplingParams(max_tokens=6, temperature=0.0), SamplingParams(max_tokens=6, seed=3, top_k=8)
    asked = [made.submit(PROMPTS[0], greedy), made.submit(PROMPTS[1], drawn)]
    made.finish()
    return [completion.tokens for completion in asked]


class RecordingPool(graphs.GraphPool):
    def __init__(self, device: Any, max_bytes: int) -> None:
        super().__init__(device, max_bytes, self._graph)

    def _graph(self) -> RecordedGraph:
        MADE.append(RecordedGraph())
        return MADE[-1]


def watched(runner: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What will be of every step: copies to the device, copies back, and draft tokens that were verified."""
    found: list[tuple[int, int, int]] = []
    launch, collect, traffic = runner.launch, runner.collect, [HostTraffic()]

    def launched(plan: Any) -> Any:
        traffic[0] = HostTraffic()
        with traffic[0]:
            return launch(plan)

    def collected(step: Any) -> Any:
        with traffic[0]:
            result = collect(step)
        found.append((traffic[0].to_device, traffic[0].to_host, sum(result.drafted)))
        return result

    monkeypatch.setattr(runner, "launch", launched)
    monkeypatch.setattr(runner, "collect", collected)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(HEAD, marks=pytest.mark.slow),
        HEAD | {"draft_width": 2},
        pytest.param(HEAD | {"kv_cache_dtype": "int8"}, marks=pytest.mark.slow),
        pytest.param(HEAD | {"kv_cache_dtype": "fp8"}, marks=pytest.mark.slow),
        {"quantize": "q8"},
        pytest.param(HEAD | {"quantize": "q4", "kv_cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["no drafter", "chains", "trees", "cache in int8", "cache in fp8", "q8", "q4 with chains, cache in int8"],
)
def test_tokens_are_those_of_the_cpu(
    tiny: str, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By graphs, with draft tokens and without; a step of the target sends once, and reads once."""
    monkeypatch.setattr(graphs, "GraphPool", RecordingPool)
    MADE.clear()
    model, kernels, more = tiny, "torch", {"speculation_policy": "fixed", "max_draft_tokens": 3}
    if "quantize" in options:  # rows of whole blocks; the compiled kernels are others that compute with them
        small = POLICY | {"num_hidden_layers": 1}
        model, kernels = str(write_policy(tmp_path / "policy", policy(0, small), small)), "native"
        more |= {"load_format": "auto", "packed_arithmetic": "exact"}
    expected, found = (engine(model, each, **options, **more) for each in (kernels, "triton"))
    has_chains = "speculation" in options and not options.get("draft_width")
    steps = watched(found.engine.runner, monkeypatch)
    try:
        with ops.use_backend("triton") if has_chains else nullcontext():  # recorded graphs know no others
            told = answers(found)
        assert told == answers(expected)
        assert found.engine.runner.model.kernels == "triton-cpu" and len(MADE) >= 2
        assert found.engine.ready().weights.startswith("packed") == ("quantize" in options)
        assert bool(sum(drafted for *_, drafted in steps)) == ("speculation" in options)
        if not options.get("draft_width"):
            assert len(steps) > 3 and {step[:2] for step in steps} == {(1, 1)}
    finally:
        found.close()
        expected.close()


@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_so_they_are_with_a_cache_of_8_bits(tiny: str, dtype: str) -> None:
    """Scales are copied with branches of trees."""
    options = HEAD | {"draft_width": 2, "kv_cache_dtype": dtype, "speculation_policy": "fixed", "max_draft_tokens": 3}
    expected, found = (engine(tiny, kernels, **options) for kernels in ("torch", "triton"))
    try:
        assert found.engine.ready().kv_cache_dtype == dtype
        assert answers(found) == answers(expected)
    finally:
        found.close()
        expected.close()


def test_what_is_recorded_to_measure_steps_serves_requests(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is measured as it is served: not by what compiling and recording take, and by the graph of its size."""
    monkeypatch.setattr(graphs, "GraphPool", RecordingPool)
    found = engine(tiny, "triton", pipeline="on", max_running=2)
    runner = found.engine.runner
    runner.runs_ahead = True
    ran: list[int] = []
    forward = runner.model.forward
    monkeypatch.setattr(runner.model, "forward", lambda *given: (ran.append(1), forward(*given))[1])
    try:
        runner.profile(1, 1, 1)
        runner.profile(1, 8, 8)
        runner.profile(4, 1, 2)  # more than may run
        assert len(ran) == 6 and not runner._table.blocks.any()
        warm_up(runner, longest=60, max_step_tokens=40)
        assert not runner._table.blocks.any()
        recorded = len(MADE)
        runner.profile(1, 1, 7)
        asked = found.submit(list(range(1, 7)), SamplingParams(max_tokens=4, temperature=0.0))
        found.finish()
        assert len(asked.tokens) == 4 and len(MADE) == recorded
    finally:
        found.close()


def test_a_step_is_launched_before_the_last_one_is_read(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one copy there and one back, which nobody waits for in vain, whatever its rows change and want to be told."""
    monkeypatch.setattr(graphs, "GraphPool", RecordingPool)
    expected, found = engine(tiny, "torch"), engine(tiny, "triton", pipeline="on")
    runner, traffic, order = found.engine.runner, HostTraffic(), []
    runner.runs_ahead = True

    def watched(name: str) -> Any:
        call = getattr(runner, name)

        def run(given: Any) -> Any:
            order.append(name)
            with traffic:
                return call(given)

        return run

    for name in ("launch", "collect"):
        monkeypatch.setattr(runner, name, watched(name))
    params = [
        SamplingParams(max_tokens=6, temperature=0.0, logprobs=2, logit_bias={5: 0.5}),
        SamplingParams(max_tokens=5, seed=3, top_k=8, allowed_token_ids=tuple(range(40))),
        SamplingParams(max_tokens=5, seed=4, logprobs=1, logprobs_mode="processed", min_tokens=2, stop_token_ids=(7,)),
    ]
    try:
        asked = [[local.submit(PROMPTS[0], each) for each in params] for local in (expected, found)]
        expected.finish()
        with ops.use_backend("triton"):
            found.finish()
        for one, other in zip(*asked, strict=True):
            assert one.tokens == other.tokens and len(one.tokens) >= 5
            told = [[entry for delta in each.deltas for entry in delta.logprobs or ()] for each in (one, other)]
            for mine, theirs in zip(*told, strict=True):
                assert mine.rank == theirs.rank and [top for top, _ in mine.top] == [top for top, _ in theirs.top]
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        steps = order.count("launch")
        assert (traffic.to_device, traffic.to_host, traffic.waits) == (steps, steps, 0)
        assert "launch launch collect launch collect launch" in " ".join(order)
    finally:
        found.close()
        expected.close()


@pytest.mark.parametrize("is_ahead", [False, True], ids=["plain", "pipeline"])
def test_a_step_and_its_drafts_are_one_copy_there_and_one_back(
    tiny: str, is_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By graphs and without, for which nobody waits in vain. Drafts are those that are made token by token, of greedy
    requests, drawn ones, and both side by side."""
    policy = HEAD | {"speculation_policy": "fixed", "max_draft_tokens": 3, "pipeline": "on" if is_ahead else "off"}
    told: list[Any] = []
    times: list[float] = []
    expected = answers(plain := engine(tiny, "torch"))
    plain.close()
    pools = (graphs.GraphPool, RecordingPool) if is_ahead else (None, graphs.GraphPool, RecordingPool)
    with ops.use_backend("triton"):
        for length, pool in enumerate(pools, 60):  # models of one length are one
            monkeypatch.setattr(graphs, "GraphPool", pool or graphs.GraphPool)
            made = engine(tiny, "triton", max_model_len=length, **policy)
            runner = made.engine.runner
            runner.runs_ahead = is_ahead
            if pool is None:
                monkeypatch.setattr(runner.speculator, "begin", lambda coming: [])
            traffic, counted, verified = HostTraffic(), [], []
            propose, found = runner.speculator.propose, []

            def watched(*given: Any, propose: Any = propose, found: Any = found) -> Any:
                offers = propose(*given)
                found.append(sorted((row.best.tree.tokens, row.best.evidence) for row in given[0] if row.best))
                return offers

            def counts(call: Any, traffic: Any = traffic) -> Any:
                def run(given: Any) -> Any:
                    with traffic:
                        return call(given)

                return run

            monkeypatch.setattr(runner.speculator, "propose", watched)
            launch, collect = counts(runner.launch), counts(runner.collect)

            def launched(plan: Any, launch: Any = launch, counted: Any = counted) -> Any:
                counted.append(plan)
                return launch(plan)

            def collected(step: Any, collect: Any = collect, verified: Any = verified) -> Any:
                result = collect(step)
                verified.append(sum(result.drafted))
                times.append(min(result.seconds, result.model_seconds, result.draft_seconds))
                return result

            monkeypatch.setattr(runner, "launch", launched)
            monkeypatch.setattr(runner, "collect", collected)
            tokens = answers(made)
            made.close()
            assert sum(verified) > 3 and len(counted) == len(verified) > 3
            if pool is None:
                assert traffic.to_device > 2 * len(counted), "nothing is counted"
            else:
                steps = len(counted)
                assert (traffic.to_device, traffic.to_host, traffic.waits) == (steps, steps, 0)
            told.append((tokens, found))
    assert all(each == told[0] for each in told) and told[0][0] == expected and min(times) >= 0
    assert any(len(tokens) > 1 for rows in told[0][1] for tokens, _ in rows), "no chain was long enough"


def test_a_step_is_launched_before_its_draft_tokens_are_known(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And how many of those before were right, whatever comes between: requests that begin or end, rows that wait."""
    monkeypatch.setattr(graphs, "GraphPool", RecordingPool)
    policy = HEAD | {"speculation_policy": "fixed", "max_draft_tokens": 2, "pipeline": "on"}
    expected, found = engine(tiny, "torch"), engine(tiny, "triton", **policy)
    runner, order, late, right = found.engine.runner, [], [], []
    runner.runs_ahead = True
    launch, collect = runner.launch, runner.collect

    def launched(plan: Any) -> Any:
        made = launch(plan)
        order.append("launch")
        # Draft tokens that nobody had read when they were to be verified.
        late.append(sum(len(tree.positions) for tree in made.inputs.trees.values() if min(tree.tree.tokens) < 0))
        return made

    def collected(step: Any) -> Any:
        result = collect(step)
        order.append("collect")
        right.append(sum(max(len(tokens) - 1, 0) for tokens in result.tokens))
        return result

    monkeypatch.setattr(runner, "launch", launched)
    monkeypatch.setattr(runner, "collect", collected)
    first = [
        SamplingParams(max_tokens=24, temperature=0.0),
        SamplingParams(max_tokens=9, seed=3, top_k=3, temperature=0.5, logprobs=1),
    ]
    then = [
        SamplingParams(max_tokens=12, temperature=0.0, min_tokens=4, stop_token_ids=tuple(range(0, 60, 2))),
        SamplingParams(max_tokens=5, seed=5, presence_penalty=0.5),
    ]
    told = []
    try:
        for local in (expected, found):
            with ops.use_backend("triton") if local is found else nullcontext():
                asked = [local.submit(PROMPTS[0], each) for each in first]
                while len(asked[0].tokens) < 8:
                    local.step()
                asked += [local.submit(PROMPTS[1], each) for each in then]
                local.finish()
            told.append([(each.tokens, each.finish_reason) for each in asked])
        assert told[0] == told[1]
        assert "launch launch collect launch collect launch" in " ".join(order)
        assert sum(each > 0 for each in late) > 3 and sum(right) > 3, (late, right)
    finally:
        found.close()
        expected.close()


def test_what_keeps_triton_from_running_is_said(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.launch, "why_not", lambda device: "there is no GPU")
    with pytest.raises(ConfigError, match=r"--kernels triton.*there is no GPU"):
        engine(tiny, "triton")


def test_another_attention_gives_the_same_tokens(tiny: str) -> None:
    """It is planned for every step, so nothing is recorded."""
    expected, found = engine(tiny, "torch"), engine(tiny, "triton", attention_backend="torch")
    try:
        one, other = (each.submit(PROMPTS[1], SamplingParams(max_tokens=4, seed=3)) for each in (expected, found))
        expected.finish()
        found.finish()
        assert one.tokens == other.tokens and len(one.tokens) == 4
        assert found.engine.runner.model.kernels == "triton-cpu-torch"
        assert not len(found.engine.runner.model.decoder.compute.graphs)  # type: ignore[union-attr, arg-type]
    finally:
        found.close()
        expected.close()


@pytest.mark.parametrize(
    ("kernels", "backend", "said"),
    [
        ("triton", "flashinfer", "--attention-backend flashinfer: it needs compute capability 8.0"),
        ("torch", "xformers", "--attention-backend xformers: torch's kernels run here"),
        ("torch", "triton", "--attention-backend triton: torch's kernels run here"),
    ],
)
def test_what_keeps_an_attention_from_running_is_said(tiny: str, kernels: str, backend: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        engine(tiny, kernels, attention_backend=backend)


def test_deterministic_results_do_not_depend_on_the_batch(tiny: str) -> None:
    """Which is refused where they would: see test_models."""
    made = engine(tiny, "triton", deterministic=True)
    try:
        params = SamplingParams(max_tokens=3, temperature=1.0, seed=3, logprobs=2)
        alone = made.submit(PROMPTS[1], params)
        made.finish()
        beside = [made.submit(PROMPTS[0], params), made.submit(PROMPTS[1], params)][1]
        made.finish()
        told = [[(delta.tokens, delta.logprobs) for delta in each.deltas] for each in (alone, beside)]
        assert told[0] == told[1] and len(alone.tokens) == 3 and made.engine.runner.model.decoder is not None
        assert made.engine.runner.model.decoder.compute.is_batch_invariant
    finally:
        made.close()
