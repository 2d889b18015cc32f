import json
from collections import Counter
from itertools import islice
from random import Random
from time import process_time

import pytest

from slipstream.loadtest.dataset import code_passages
from slipstream.loadtest.workloads import CHAT, COMPLETIONS, Workload, WorkloadError, WorkloadOptions

pytestmark = pytest.mark.usefixtures("sharegpt")


async def rounds(*counts, tokenizer=None, **options):
    workload = Workload(WorkloadOptions(**options), tokenizer)
    return [await workload.round(count) for count in counts]


def prompt(request) -> str:
    body = request.body
    return body["prompt"] if "prompt" in body else "\n".join(message["content"] for message in body["messages"])


class WordTokenizer:
    """Runs of letters and of everything else are tokens; two special tokens as with a begin and an end mark.

    A long run at the end of the text is two tokens, so a text cut behind such a token gets longer by one.
    """

    def __init__(self):
        self.words = {}

    async def tokenize(self, text, *, add_special_tokens=True):
        pieces, start = [], 0
        for end in range(1, len(text) + 1):
            if end == len(text) or text[end].isalpha() != text[end - 1].isalpha():
                pieces.append(text[start:end])
                start = end
        if len(pieces[-1]) > 3:
            pieces[-1:] = [pieces[-1][:3], pieces[-1][3:]]
        special = [-1, -2] if add_special_tokens else []
        return special + [self.words.setdefault(piece, len(self.words)) for piece in pieces]

    async def detokenize(self, tokens):
        words = list(self.words)
        return "".join(words[token] for token in tokens)


@pytest.mark.parametrize("name", ["sharegpt", "shared-prefix", "long", "rewrite", "extract", "code", "fixed"])
async def test_a_seed_gives_the_same_prompts_and_no_round_repeats_one(name):
    first = await rounds(8, 12, name=name)
    assert first == await rounds(8, 12, name=name)
    assert first != await rounds(8, 12, name=name, seed=1)
    prompts = [prompt(request) for each in first for request in each]
    assert len({text[:200] for text in prompts}) == (2 if name == "shared-prefix" else 20)
    assert len(set(prompts)) == 20


async def test_sharegpt_prompts_are_real_questions_of_sensible_length(sharegpt):
    (requests,) = await rounds(300, name="sharegpt", output_tokens=64, temperature=0.5)
    texts = [prompt(request) for request in requests]
    assert all(10 <= len(text) <= 4000 for text in texts)
    assert all(
        request.path == CHAT and request.body["max_tokens"] == 64 and request.body["temperature"] == 0.5
        for request in requests
    )
    file = sharegpt.read_bytes()
    assert all(json.dumps(text).encode() in file for text in texts[:10])


async def test_hundreds_of_prompts_take_seconds():
    start = process_time()
    await rounds(500, name="sharegpt")
    assert process_time() - start < 20


async def test_shared_prefix_has_one_system_prompt_per_round():
    first, second = await rounds(5, 5, name="shared-prefix", input_tokens=400)
    systems = [[request.body["messages"][0] for request in each] for each in (first, second)]
    assert all(message == each[0] for each in systems for message in each)
    assert systems[0][0] != systems[1][0]
    assert len({request.body["messages"][1]["content"] for request in first + second}) == 10
    assert 1600 <= len(systems[0][0]["content"]) <= 1700


@pytest.mark.parametrize("name", ["long", "fixed"])
async def test_lengths_are_estimated_without_a_tokenizer(name):
    (requests,) = await rounds(3, name=name, input_tokens=1000)
    assert all(4000 <= len(prompt(request)) <= 4100 for request in requests)


async def test_fixed_lengths_are_exact_with_a_tokenizer():
    tokenizer = WordTokenizer()
    for tokens in (3, 64, 500):
        (requests,) = await rounds(6, name="fixed", input_tokens=tokens, tokenizer=tokenizer)
        assert all(request.path == COMPLETIONS for request in requests)
        assert [len(await tokenizer.tokenize(prompt(request))) for request in requests] == [tokens] * 6


async def test_long_prompts_have_about_their_length_with_a_tokenizer():
    tokenizer = WordTokenizer()
    (requests,) = await rounds(3, name="long", input_tokens=1000, tokenizer=tokenizer)
    for request in requests:
        assert 1000 <= len(await tokenizer.tokenize(prompt(request))) <= 1040


@pytest.mark.parametrize(
    ("name", "ignore_eos", "sent"),
    [("fixed", None, True), ("fixed", False, None), ("sharegpt", None, None), ("sharegpt", True, True)],
)
async def test_ignore_eos_is_sent_where_it_is_meant(name, ignore_eos, sent):
    ((request,),) = await rounds(1, name=name, ignore_eos=ignore_eos)
    assert request.body.get("ignore_eos") is sent


async def test_running_out_of_prompts_is_an_error(tmp_path):
    path = tmp_path / "tiny.json"
    turns = [{"from": "human", "value": "What is the capital of France?"}, {"from": "gpt", "value": "Paris. " * 200}]
    path.write_text(json.dumps([{"id": "one", "conversations": turns}]))
    with pytest.raises(WorkloadError, match=r"tiny\.json"):
        await rounds(2, name="sharegpt", dataset=path)
    with pytest.raises(WorkloadError, match=r"tiny\.json"):
        await rounds(2, name="fixed", input_tokens=20, dataset=path)


@pytest.mark.parametrize(
    "options", [{"name": "shakespeare"}, {"input_tokens": 5}, {"output_tokens": 0}, {"name": "long", "input_tokens": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError):
        WorkloadOptions(**options)


async def test_rewrite_alternates_between_texts_and_code():
    workload = Workload(WorkloadOptions(name="rewrite"))
    prompts = [request.body["messages"][0]["content"] for request in await workload.round(6)]
    tasks, texts = zip(*(prompt.split("\n\n", 1) for prompt in prompts), strict=True)
    assert tasks[:3] == tasks[3:] and len(set(tasks)) == 3
    assert len(set(texts)) == 6
    assert all(text.lstrip().startswith("def ") and len(text) == 800 for text in texts[2::3])


def test_passages_of_code_never_overlap():
    passages = list(islice(code_passages(Random(0), 800), 300))
    lines = Counter(line for passage in passages for line in {*passage.splitlines()[1:-1]} if len(line) > 60)
    assert lines.most_common(1)[0][1] <= 3  # real code repeats itself a little


def test_code_ends_where_all_of_it_was_used():
    passages = list(code_passages(Random(0), 100_000))
    assert 5 < len(passages) == len(set(passages)) < 100
