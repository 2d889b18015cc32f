"""What a grammar allows, held against languages that can be written down whole."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.endings import Mask
from slipstream.engine.grammars.grammar import MOST_KEPT, Constraint, Grammars
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import Pause, Resume, UseVocabulary
from slipstream.engine.speculation.tree import Tree
from slipstream.engine.testing.local import TINY_LLAMA, LocalEngine

TOKENS = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"\xc3", b"\xa9", b"<end>", b"b"]
END = 8
VOCAB = 12
"""The model has more tokens than the tokenizer."""
WORDS = st.text("ab", min_size=1, max_size=5)


def choice(words: Sequence[str]) -> str:
    return "start: " + " | ".join(json.dumps(word) for word in words)


def regex(pattern: str) -> str:
    return f"start: /{pattern}/"


def schema(found: object) -> str:
    return f"start: %json {json.dumps(found)}"


def test_the_compiler_is_imported_for_the_first_grammar() -> None:
    told = "import sys; from slipstream.engine.grammars.grammar import Grammars"
    use = "found = Grammars(); found.use([b'a'], [], 1)"
    loaded = "print('llguidance' in sys.modules)"
    code = f"{told}; {use}; {loaded}; found.compile('start: /a/'); {loaded}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    found = Grammars()
    found.use(TOKENS, [END], VOCAB)
    return found


def allowed_by(words: Sequence[str], said: bytes) -> set[int]:
    """The tokens after which one of the words can still come of it; the end where it is one."""
    whole = [word.encode() for word in words]
    found = {token for token, data in enumerate(TOKENS) if data and any(word.startswith(said + data) for word in whole)}
    return (found - {END}) | ({END} if said in whole else set())


def set_bits(mask: Mask | None) -> set[int]:
    assert mask is not None
    return set(np.unpackbits(mask, bitorder="little").nonzero()[0].tolist())


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), max_size=7))
    return Tree(tokens, [draw(st.integers(-1, node - 1)) for node in range(len(tokens))])


@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(0, 10), trees())
def test_masks_at_every_node_of_a_tree_are_those_of_the_language(
    grammars: Grammars, words: list[str], steps: int, tree: Tree
) -> None:
    params = SamplingParams(max_tokens=20, stop_token_ids=(END,), grammar=choice(words))
    constraint = grammars.constrain(params, [])
    assert constraint is not None
    said, output = b"", list[int]()
    for step in range(steps):
        before = set_bits(constraint.masks()[0])
        assert before == allowed_by(words, said)
        if not (more := sorted(before - {END})):
            break
        output.append(more[step % len(more)])
        said += TOKENS[output[-1]]
        constraint.advance(output[-1:])

    texts: dict[int, bytes] = {-1: said}
    expected: list[int] = []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        if parent in texts and token in allowed_by(words, texts[parent]):
            expected.append(node)
            if token != END:
                texts[node] = texts[parent] + TOKENS[token]
    assert constraint.permitted(tree) == expected

    place = {-1: -1} | {node: at for at, node in enumerate(expected)}
    cut = Tree([tree.tokens[node] for node in expected], [place[tree.parents[node]] for node in expected])
    again = Constraint(grammars.compile(params.grammar), params, output)  # as after a preemption
    for each in (constraint, again, constraint):
        root, *nodes = each.masks(cut)
        assert set_bits(root) == allowed_by(words, said)
        for node, mask in zip(expected, nodes, strict=True):
            if tree.tokens[node] == END:
                assert mask is None
            else:
                assert set_bits(mask) == allowed_by(words, texts[node])


def test_stop_tokens_wait_for_min_tokens_unless_nothing_else_is_left(grammars: Grammars) -> None:
    params = SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=(END, 1, 9), grammar=choice(["ab", "abab"]))
    constraint = grammars.constrain(params, [])
    assert constraint is not None
    first, second, last = constraint.masks(Tree([2, 2], [-1, 0]))
    assert set_bits(first) == {0, 2}
    assert set_bits(second) == {0, 2}, "b and the end stop, so they wait"
    assert set_bits(last) == {END, 1, 9}, "the language has no more"
    constraint.advance([2, 2, END, 0, 0])
    assert constraint.masks() == [None] and constraint.permitted(Tree([0], [-1])) == []


@given(
    st.lists(WORDS, min_size=1, max_size=6), st.integers(0, 6), st.lists(st.integers(0, 99), min_size=12, max_size=12)
)
@example(["ab", "abab"], 0, [0] * 12)  # shortened from the first token on
def test_who_ends_in_time_says_a_word_whenever_there_is_time_for_one(
    grammars: Grammars, words: list[str], more: int, picks: list[int]
) -> None:
    params = SamplingParams(max_tokens=99, stop_token_ids=(END,), grammar=choice(words), ends_in_time=True)
    needed = len(min(words)) + 1  # the end that is found is that of the first word by its letters, or shorter
    params = msgspec.structs.replace(params, max_tokens=needed + more)
    constraint, output = Constraint(grammars.compile(params.grammar), params), list[int]()
    was_narrow = False
    while len(output) < params.max_tokens and END not in output:
        said = b"".join(TOKENS[token] for token in output)
        allowed = set_bits(constraint.masks()[0])
        assert allowed and allowed <= allowed_by(words, said)
        was_narrow = was_narrow or allowed != allowed_by(words, said)
        output.append(sorted(allowed)[picks[len(output)] % len(allowed)])
        constraint.advance(output[-1:])
        again = Constraint(grammars.compile(params.grammar), params, output)  # as after a preemption
        assert END in output or set_bits(again.masks()[0]) == set_bits(constraint.masks()[0])
        assert constraint.is_shortened == again.is_shortened == was_narrow
    assert b"".join(TOKENS[token] for token in output if token != END).decode() in words


@given(
    st.sampled_from(["a+", "a+b?", "(ab)+", "(a|ab)(ba)*", "(a{1,3}b)*a"]),
    st.integers(0, 9),
    st.lists(st.integers(0, 99), min_size=14, max_size=14),
)
def test_texts_that_may_end_and_go_on_match_wherever_they_are_cut(
    grammars: Grammars, pattern: str, more: int, picks: list[int]
) -> None:
    params = SamplingParams(max_tokens=3 + more, stop_token_ids=(END,), grammar=regex(pattern), ends_in_time=True)
    constraint, output = Constraint(grammars.compile(params.grammar), params), list[int]()
    while len(output) < params.max_tokens and END not in output:
        allowed = sorted(set_bits(constraint.masks()[0]))
        output.append(allowed[picks[len(output)] % len(allowed)])
        constraint.advance(output[-1:])
    said = text_of(output)
    assert re.fullmatch(pattern, said), said


OPEN = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "items": {"type": "array", "items": {"type": "object", "properties": {"label": {"enum": ["one", "two"]}}}},
        "when": {
            "anyOf": [{"type": "number"}, {"type": "null"}, {"type": "string", "pattern": "^[0-9]{4}-[01][0-9]$"}]
        },
    },
    "required": ["name", "items", "when"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spare", [0, 1, 7, 40])
def test_objects_are_closed_in_time_though_every_token_is_drawn_by_lot(seed: int, spare: int) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [
        b'":',
        b'","',
        b"[]",
        b"[{",
        b"}]",
        b'"}',
        b'."',
        b" the",
        b"\xc3\xa4",
    ]
    stop = len(tokens)
    found = Grammars()
    found.use([*tokens, b"<end>"], [stop], stop + 1)
    shortest = len('{"name":"","items":[],"when":"0000-00"}')
    params = SamplingParams(
        max_tokens=shortest + spare, stop_token_ids=(stop,), grammar=schema(OPEN), ends_in_time=True
    )
    constraint, output = Constraint(found.compile(params.grammar), params), list[int]()
    draw = random.Random(seed)
    while stop not in output and len(output) < params.max_tokens:
        output.append(draw.choice(sorted(set_bits(constraint.masks()[0]))))
        constraint.advance(output[-1:])
    said = json.loads(b"".join(tokens[token] for token in output[:-1]))
    assert output[-1] == stop and constraint.is_shortened and list(said) == ["name", "items", "when"]


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("{", "JSONDecodeError"),
        ("start: missing", "unknown name"),
        (regex("(a"), "unclosed group"),
        (regex("c"), "no token of the model can go on with it"),
        (schema({"type": "string", "enum": [1]}), "Unsatisfiable"),
        (schema({"$ref": "http://127.0.0.1/x"}), "not present"),
        ("start: <|unknown|>", "unknown special token"),
    ],
)
def test_what_is_no_grammar_is_refused_with_a_reason(grammars: Grammars, grammar: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        grammars.compile(grammar)
    assert "backtrace" not in str(raised.value) and "<non-verbose" not in str(raised.value)


HOSTILE = {
    "repeated repetitions": regex("(((a{1,999}){1,999}){1,999}){1,999}"),
    "deep groups": regex("(" * 2000 + "a" + ")" * 2000),
    "deep rules": ("start: " + "(" * 2000 + '"a"' + ")" * 2000),
    "many rules": ("\n".join(["start: r0", *(f'r{i}: "a" r{i + 1} | r{i + 1} "b"' for i in range(150)), 'r150: "a"'])),
    "ambiguous": ('start: x\nx: x x | x x x | "a" | ""'),
    "negations": ("start: A\nA: " + " & ".join(f"~/(?s:.*)a.{{{i}}}b(?s:.*)/" for i in range(60))),
    "blown up by counting": regex("[ab]*a[ab]{2000}"),
    "large bounds": schema({"type": "string", "pattern": "^(a|b|ab){5000}$", "minLength": 4999, "maxLength": 10**9}),
    "references in circles": schema({"$ref": "#"}),
    "deep schema": ("start: %json " + '{"items":' * 400 + "{}" + "}" * 400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(grammars: Grammars, name: str) -> None:
    """Those that need not be tried elsewhere before (server/preparing/vetting.py)."""
    assert len(HOSTILE[name]) <= 4096
    began = time.thread_time()
    try:
        compiled = grammars.compile(HOSTILE[name])
        params = SamplingParams(max_tokens=99, stop_token_ids=(END,), grammar=HOSTILE[name])
        constraint = Constraint(compiled, params)
        for _ in range(30):
            mask = constraint.masks()[0]
            constraint.advance([min(set_bits(mask) - {END}, default=END)])
    except RequestError as error:
        assert str(error).startswith("the grammar cannot be used: ") and len(str(error)) < 600
    assert time.thread_time() - began < 20, "bounded by fuel, which takes a hundredth of that"


def test_who_takes_more_and_more_to_follow_is_refused_in_time(grammars: Grammars) -> None:
    """Within the library's limits on each step, which such grammars reach late."""
    grammar = 'start: x\nx: x x x | x x | "a" | "b"'
    params = SamplingParams(max_tokens=999, stop_token_ids=(END,), grammar=grammar)
    constraint = Constraint(grammars.compile(grammar), params)
    began = time.thread_time()
    with pytest.raises(RequestError, match="the grammar cannot be used"):
        for _ in range(400):
            constraint.masks()
            constraint.advance([0])
    assert time.thread_time() - began < 20, "a tenth of that is what it may take"


def test_grammars_are_kept_while_somebody_has_them_and_the_latest_beyond(grammars: Grammars) -> None:
    held = grammars.compile(choice(["ab"]))
    texts = [choice(["a" * (number + 1)]) for number in range(MOST_KEPT + 1)]
    for text in texts:
        grammars.compile(text)
    assert grammars.find(choice(["ab"])) is held
    assert grammars.find(texts[0]) is None and grammars.find(texts[-1]) is not None


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    folder = tmp_path_factory.mktemp("model")
    shape = TINY_LLAMA | {"vocab_size": VOCAB, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(shape))
    save_file(dict(dummy_tensors(shape, 0)), folder / "model.safetensors")
    found = LocalEngine(EngineConfig(model=str(folder), dtype="float32", kv_cache_memory="4MiB", max_running=4))
    yield found
    found.close()


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(TOKENS[token] for token in tokens if token != END).decode()


def test_without_a_vocabulary_grammars_are_refused(local: LocalEngine) -> None:
    params = SamplingParams(max_tokens=5, stop_token_ids=(END,), grammar=choice(["a"]))
    [done] = local.generate([[1]], params)
    assert done.finish_reason == "error" and "not told" in str(done.deltas[-1].error)
    local.engine.operate(UseVocabulary(TOKENS, [END]))
    [done] = local.generate([[1]], params)
    assert text_of(done.tokens) == "a" and done.finish_reason == "stop"


def test_answers_are_in_the_language_whatever_else_is_asked_for(local: LocalEngine) -> None:
    local.engine.operate(UseVocabulary(TOKENS, [END]))
    words = ["ab", "abab", "baa", "aabb"]
    params = SamplingParams(
        max_tokens=9, stop_token_ids=(END,), grammar=choice(words), temperature=2.0, logit_bias={END: 100.0, 5: 100.0}
    )
    asked = [local.submit([1, 2, 3], params) for _ in range(20)]
    plain = local.submit([1, 2, 3], SamplingParams(max_tokens=9, temperature=0.0))
    local.finish()
    assert {text_of(done.tokens) for done in asked} <= set(words)
    assert len({text_of(done.tokens) for done in asked}) > 1
    assert all(done.finish_reason == "stop" for done in asked)
    assert plain.tokens == local.generate([[1, 2, 3]], SamplingParams(max_tokens=9, temperature=0.0))[0].tokens


def test_who_waits_for_a_grammar_can_be_aborted_refused_or_paused_and_holds_nobody_up(local: LocalEngine) -> None:
    local.engine.operate(UseVocabulary(TOKENS, [END]))
    params = SamplingParams(max_tokens=9, stop_token_ids=(END,), grammar=choice(["aaa"]))
    wrong = SamplingParams(max_tokens=9, stop_token_ids=(END,), grammar=choice(["c"]))
    aborted, refused = local.submit([1], params), local.submit([1], wrong)
    plain = local.submit([1], SamplingParams(max_tokens=3))
    late = local.submit([2], params)
    local.engine.scheduler.abort([aborted.request_id])
    local.engine.operate(Pause("keep"))
    assert not local.engine.core.has_work or local.engine.scheduler.is_still
    local.engine.operate(Resume())
    local.finish()
    assert aborted.finish_reason == "abort" and len(plain.tokens) == 3
    assert refused.finish_reason == "error" and refused.deltas[-1].is_refused
    assert text_of(late.tokens) == "aaa"
    assert local.engine.scheduler.stats().num_waiting == 0


def test_a_grammar_that_fails_midway_ends_its_request_alone(
    local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.engine.operate(UseVocabulary(TOKENS, [END]))
    params = SamplingParams(max_tokens=30, seed=1, stop_token_ids=(END,), grammar=regex("[ab]{40}"))
    others = [SamplingParams(max_tokens=30, temperature=0.0), params]
    expected = [local.generate([[3, 4]], other)[0].tokens for other in others]
    failing = local.submit([1, 2], params)
    asked = [local.submit([3, 4], other) for other in others]
    while len(failing.tokens) < 5:
        local.step()
    [constraint] = [
        each for slot, each in local.engine.runner._table.constraints.items()
        if local.engine.runner._table.drafts(slot).draft.request_id == failing.request_id
    ]  # fmt: skip
    monkeypatch.setattr(constraint, "_left_s", -1.0)
    local.finish()
    assert failing.finish_reason == "error" and failing.deltas[-1].is_refused
    assert "per token" in str(failing.deltas[-1].error)
    assert [each.tokens for each in asked] == expected
