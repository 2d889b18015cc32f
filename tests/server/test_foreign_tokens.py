"""A tokenizer with more tokens than the model, and files that name tokens which the model does not have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from slipstream.engine.checkpoint.dummy import dummy_tensors
from slipstream.engine.testing.local import TINY_LLAMA

END, PAD, BEGIN = 256, 257, 258
VOCAB = PAD
"""The model has the 256 bytes and an end token; the tokenizer also [PAD], and <|begin|> before every text."""
CONFIG = TINY_LLAMA | {"vocab_size": VOCAB, "eos_token_id": [END, PAD, 300_000]}
GENERATION = {"eos_token_id": [END, PAD, 300_000, -1], "temperature": 0.5, "top_p": 7, "repetition_penalty": 1e-38}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, start_local: Callable[..., Any]) -> Any:
    folder = tmp_path_factory.mktemp("padded")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    save_file(dict(dummy_tensors(CONFIG, 0)), folder / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("[PAD]", special=True)])
    backend.add_special_tokens([AddedToken("<|begin|>", special=True)])
    boundaries = [("<|begin|>", BEGIN), ("<|end|>", END)]
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A <|end|>", special_tokens=boundaries)
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    described = {"eos_token": "<|end|>", "pad_token": "[PAD]", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return start_local(model=str(folder), generation_config="auto")


LACKING = {
    "text": ("prompt", {"prompt": "hello [PAD] you"}),
    "one of several texts": ("prompt", {"prompt": ["hello", "you [PAD]"]}),
    "ids": ("prompt", {"prompt": [1, PAD]}),
    "lists of ids": ("prompt", {"prompt": [[1], [2, PAD]]}),
    "conversation": ("messages", {"messages": [{"role": "user", "content": "hello [PAD] you"}]}),
    "logit_bias": ("logit_bias", {"logit_bias": {str(PAD): 1}}),
    "allowed_token_ids": ("allowed_token_ids", {"allowed_token_ids": [1, PAD]}),
    "stop_token_ids": ("stop_token_ids", {"stop_token_ids": [PAD]}),
    "bad_words": ("bad_words", {"bad_words": ["x", "a[PAD]"]}),
}


@pytest.mark.parametrize("way", LACKING)
def test_a_token_that_the_model_lacks_is_named(padded: Any, way: str) -> None:
    param, fields = LACKING[way]
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
    ):
        if {"prompt", "messages"} & fields.keys() and not body.keys() & fields.keys():
            continue
        status, reply = padded.post(path, {**body, "max_tokens": 3, **fields})
        assert status == 400 and reply["error"]["param"] == param, reply
        assert "[PAD]" in reply["error"]["message"] and str(PAD) in reply["error"]["message"]


def test_what_the_files_name_and_the_model_lacks_is_ignored_with_a_warning(padded: Any) -> None:
    log = padded.wait_until_logged(
        "257, 300000, -1", "'[PAD]'", "top_p", "repetition_penalty", "['<|begin|>'] around texts"
    )
    assert padded.post("/tokenize", {"prompt": ""})[1]["tokens"] == [END]
    assert "temperature" not in log
    # These tokens would be masked.
    assert padded.complete("hello", min_tokens=3, max_tokens=4)["usage"]["completion_tokens"] >= 3


def test_tokens_that_only_the_tokenizer_has_can_be_looked_at(padded: Any) -> None:
    status, reply = padded.post("/tokenize", {"prompt": "a[PAD]"})
    assert status == 200 and reply["tokens"][1] == PAD
    _, said = padded.post("/detokenize", {"tokens": reply["tokens"]})
    assert said["prompt"] == said["text"] == "a[PAD]<|end|>"
    assert padded.post("/detokenize", {"tokens": [BEGIN + 1]})[0] == 400


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-42, 1e-38, 1e-10])
def test_a_temperature_near_zero_takes_the_most_likely(padded: Any, temperature: float) -> None:
    greedy = padded.complete("hello", max_tokens=8, ignore_eos=True)["choices"][0]
    cold = padded.complete(
        "hello", max_tokens=8, ignore_eos=True, temperature=temperature, logprobs=2, logprobs_mode="processed"
    )["choices"][0]
    assert cold["text"] == greedy["text"]
    assert cold["logprobs"]["token_logprobs"] == [0.0] * 8


pieces = st.sampled_from(["[PAD]", "<|end|>", "hello", " ", "é", "[P", "AD]"])
ids = st.integers(-2, VOCAB + 2) | st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64])
prompts = st.lists(pieces, max_size=5).map("".join) | st.lists(ids, min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    prompt=prompts,
    fields=st.fixed_dictionaries(
        {},
        optional={
            "logit_bias": st.dictionaries(ids.map(str), st.sampled_from([-100, 0, 5e-324, 100]), max_size=2),
            "allowed_token_ids": st.lists(ids, min_size=1, max_size=3),
            "stop_token_ids": st.lists(ids, max_size=2),
            "bad_words": st.lists(pieces, max_size=2),
            "min_tokens": st.integers(0, 2),
        },
    ),
)
def test_any_mixture_of_ids_is_answered_or_refused(padded: Any, prompt: Any, fields: dict[str, Any]) -> None:
    status, reply = padded.post(
        "/v1/completions", {"prompt": prompt, "max_tokens": 2, "return_token_ids": True, **fields}
    )
    assert status in (200, 400), reply
    if status == 400:
        assert reply["error"]["param"].split(".")[0] in {"prompt", *fields}
    else:
        [choice] = reply["choices"]
        assert all(0 <= token < VOCAB for token in choice["prompt_token_ids"] + choice["token_ids"])
    assert padded.get("/health")[0] == 200
