"""Answers are the same however work is cut and mixed, and whatever drafts: in every form, on every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from slipstream.drafter.choice import make_drafters
from slipstream.drafter.head import layout
from slipstream.drafter.head.drafter import FirstHead, HeadDrafter
from slipstream.drafter.lookup import NGramDrafter, SuffixDrafter
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.models.config import DecoderConfig
from slipstream.engine.operations import LoadAdapter
from slipstream.engine.speculation.oracles import OracleDrafter, TreeOracleDrafter
from slipstream.engine.speculation.protocol import Drafter
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.engine.testing.lora import random_lora, write_lora
from slipstream.kernels.native import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native kernels on this machine")
VARIANTS = [name for name, runs in library.variants().items() if runs]
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"weights": "float32", "dtype": "float32"},
    "bfloat16": {"weights": "bfloat16", "dtype": "bfloat16"},
    "exact": {"weights": "packed", "packed_arithmetic": "exact", "dtype": "bfloat16"},
    "rounded": {"weights": "packed", "packed_arithmetic": "bfloat16", "dtype": "bfloat16"},
    "int16": {"weights": "packed", "packed_arithmetic": "int16", "dtype": "bfloat16"},
    "int8": {"weights": "packed", "packed_arithmetic": "int8", "dtype": "bfloat16"},
    "cache in int8": {"weights": "bfloat16", "dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "cache in fp8": {"weights": "float32", "dtype": "float32", "kv_cache_dtype": "fp8"},
    "q8": {"quantize": "q8", "packed_arithmetic": "int16", "dtype": "bfloat16"},
    "q4": {"quantize": "q4", "packed_arithmetic": "bfloat16", "dtype": "bfloat16"},
}
PROMPTS = [[1, 2, 3, 1, 2], [0, 1, 0, 1, 0, 1, 0], [4, 4, 4], [*range(7), 5, 3] * 5, [6, 5, 0, 2] * 20]
SAMPLED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 11},
    "penalties": {"temperature": 0.0, "frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.3},
}
Run = Callable[..., list[Completion]]


@pytest.fixture(params=VARIANTS, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.isa()
    yield request.param
    assert before is not None
    library.select(before)


@pytest.fixture
def run(engine: Callable[..., LocalEngine], tiny: Path, packed: Path, isa: str, request: pytest.FixtureRequest) -> Run:
    """Runs all prompts in the form that the test is for, ``rounds`` times; the last answers."""
    form = FORMS[request.getfixturevalue("form")]
    kept = form.get("weights", "packed")
    model = packed if form.get("weights") == "packed" else tiny

    def run(
        sampled: str,
        drafters: Sequence[Drafter] = (),
        rounds: int = 1,
        copies: int = 1,
        preempted: bool = False,
        **fields: Any,
    ) -> list[Completion]:
        if preempted:  # a cache that is too small for all of them at once
            bits = 8 if "kv_cache_dtype" in form else 32 if form["dtype"] == "float32" else 16
            size = f"{3 * bits + 2 * (bits == 8)}KiB"  # beside 8 bits lie scales
            fields |= {"prefix_caching": False, "kv_cache_memory": size}
        local = engine(drafters, **(form | {"isa": isa, "model": str(model)} | fields))
        assert local.engine.ready().kernels == f"native-{isa}" and kept in local.engine.ready().weights
        params = SamplingParams(**({"max_tokens": 48, "logprobs": 2, "logit_bias": {7: -100.0}} | SAMPLED[sampled]))
        for _ in range(rounds):
            found = local.generate([prompt for prompt in PROMPTS for _ in range(copies)], params)
        assert not preempted or local.stats.preemptions
        local.close()
        return found[::copies]

    return run


def heard(completions: Sequence[Completion]) -> list[Any]:
    """All that a client can tell apart: tokens, their probabilities to the bit, and why the answer ended."""
    entries = [[entry for delta in done.deltas for entry in delta.logprobs] for done in completions]
    return [
        (done.tokens, done.finish_reason, [(one.token, one.logprob, one.rank, one.top) for one in of_one])
        for done, of_one in zip(completions, entries, strict=True)
    ]


def accepted(completions: Sequence[Completion]) -> int:
    return sum(delta.num_accepted for done in completions for delta in done.deltas)


def oracles(alone: Sequence[Completion]) -> tuple[Drafter, Drafter]:
    answers = {tuple(prompt): done.tokens for prompt, done in zip(PROMPTS, alone, strict=True)}
    return OracleDrafter(answers, 0.8), TreeOracleDrafter(answers, 0.9, 8)


def random_head(target: DecoderConfig) -> FirstHead:
    config = layout.config_for(target, 8)
    return FirstHead(config, layout.random_tensors(config, 0))


@pytest.mark.parametrize("form", FORMS)
def test_all_at_once_is_as_alone(run: Run, form: str) -> None:
    """Several ways in each run, so that there are few of them."""
    alone = run("sampled", max_running=1, prefix_caching=False)
    chain, trees = oracles(alone)
    drafters = [chain, NGramDrafter(), SuffixDrafter(10_000), HeadDrafter(random_head)]
    again = run("sampled", drafters, rounds=2, copies=2, max_step_tokens=24, max_running=8)
    assert again[-1].num_cached_tokens >= 64 and accepted(again) > 10
    assert heard(again) == heard(alone)
    again = run("sampled", [trees], copies=3, draft_width=2, max_draft_tokens=7, preempted=True)
    assert accepted(again) > 10
    assert heard(again) == heard(alone)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_adapters_are_as_alone(
    engine: Callable[..., LocalEngine], tiny: Path, packed: Path, isa: str, form: str, tmp_path: Path
) -> None:
    model = packed if FORMS[form].get("weights") == "packed" else tiny
    local = engine([NGramDrafter()], **(FORMS[form] | {"isa": isa, "model": str(model), "prefix_caching": False}))
    decoder = local.engine.loaded.model.decoder
    assert decoder is not None
    for name, rank in (("a", 3), ("b", 20)):
        folder = write_lora(tmp_path / name, random_lora(decoder.weight_shapes, rank, rank))
        local.operate(LoadAdapter(name, str(folder)))
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
    names = ["", "a", "b", "a", ""]

    def answered(several: Sequence[tuple[str, list[int]]]) -> list[Any]:
        open_requests = [local.submit(prompt, params, adapter=name) for name, prompt in several]
        local.finish()
        return heard(open_requests)

    asked = list(zip(names, PROMPTS, strict=True))
    alone = [answered([each])[0] for each in asked]
    assert answered(asked) == alone
    assert all(answered([("", prompt)])[0] != one for (name, prompt), one in zip(asked, alone, strict=True) if name)
    local.close()


@pytest.mark.slow
@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("form", FORMS)
def test_each_way_is_as_alone(run: Run, form: str, sampled: str, tiny: Path) -> None:
    alone = run(sampled, max_running=1, prefix_caching=False)
    expected = heard(alone)
    assert heard(run(sampled, copies=4)) == expected
    assert heard(run(sampled, copies=4, pipeline="on")) == expected
    assert heard(run(sampled, max_step_tokens=24, max_running=8, prefix_caching=False)) == expected
    hits = run(sampled, rounds=2)
    assert hits[-1].num_cached_tokens >= 64 and heard(hits) == expected
    assert heard(run(sampled, copies=3, preempted=True)) == expected

    chain, trees = oracles(alone)
    own = EngineConfig(model=str(tiny), draft_model=str(tiny), speculation="draft", dtype="float32")
    wide = {"draft_width": 3, "max_draft_tokens": 7}
    for drafters, fields in (
        ([NGramDrafter()], {}),
        ([SuffixDrafter(10_000)], {"rounds": 2}),
        ([HeadDrafter(random_head)], {}),
        ([HeadDrafter(random_head, width=3)], wide),
        (make_drafters(own), {}),
        ([chain], {}),
        ([trees], wide),
        ([chain, *make_drafters(own), NGramDrafter(), SuffixDrafter(10_000), HeadDrafter(random_head)], {}),
    ):
        again = run(sampled, drafters, copies=2, **fields)
        assert heard(again) == expected
        if chain in drafters or trees in drafters:
            assert accepted(again) > 10
