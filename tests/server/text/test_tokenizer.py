"""Tokenizers against pipelines built independently and against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slipstream.engine.checkpoint import locate
from slipstream.engine.checkpoint.gguf_file import GGUFFile
from slipstream.engine.errors import ModelError
from slipstream.server.text import Tokenizer, load_tokenizer

TRICKY = [
    "",
    " ",
    "\n\n  indented\ttabs\r\n",
    "It's 12345 o'clock, WE'LL see: don't!",
    "naïve café — “quotes” … ½ ② Ⅳ",
    "你好，世界 👩‍👩‍👧 नमस्ते \u0301combining",
    "e\u0301 versus \u00e9",  # NFC makes these equal
    "x=1;y=22;z=333;w=4444 //comment\nreturn(a[0]+b)",
    "\x00\x7f\u200b\ufffd",
    "HelloWorldFooBar ALLCAPS mixedCase don'T",
]
GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Written out as the tokenizer.json files of these models have them.
SMOLLM_SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT])
LLAMA3_SPLIT = split(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2_SPLIT = split(
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEKKEN_SPLIT = split(
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def test_default_model_encodes_like_smollm2s_definition(
    default_tokenizer: Tokenizer, conversation_texts: list[str]
) -> None:
    meta = GGUFFile(locate("default")).metadata
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    reference = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    reference.pre_tokenizer = SMOLLM_SPLIT
    reference.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    reference.add_special_tokens(control)
    texts = TRICKY + conversation_texts + [f"<|im_start|>user\n{TRICKY[4]}<|im_end|>\n"]
    assert [default_tokenizer.encode(text) for text in texts] == [each.ids for each in reference.encode_batch(texts)]
    assert default_tokenizer.encode("<|im_start|>2024<|im_end|>") == [1, 34, 32, 34, 36, 2]


def test_default_model_round_trip(default_tokenizer: Tokenizer, conversation_texts: list[str]) -> None:
    for text in TRICKY + conversation_texts:
        assert default_tokenizer.decode(default_tokenizer.encode(text), skip_special_tokens=False) == text


def test_default_model_agrees_with_transformers_but_for_numbers(
    default_tokenizer: Tokenizer, conversation_texts: list[str]
) -> None:
    """transformers' GGUF loading does not split numbers into digits, as the file's pre-tokenizer (smollm) asks for."""
    path = locate("default")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = ["".join(char for char in text if not char.isnumeric()) for text in TRICKY + conversation_texts]
    assert [default_tokenizer.encode(text) for text in texts] == theirs(texts, add_special_tokens=False)["input_ids"]


def test_default_model_facts(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.vocab_size == 49152
    assert default_tokenizer.bos_token_id == 1
    assert default_tokenizer.eos_token_ids == (2,)
    assert default_tokenizer.special_ids == set(range(17))
    assert default_tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert default_tokenizer.chat_template is not None
    assert default_tokenizer.encode_batch(["a", "b c"]) == [default_tokenizer.encode(text) for text in ("a", "b c")]


def test_token_texts(default_tokenizer: Tokenizer) -> None:
    ids = default_tokenizer.encode(" 你好 world")
    assert b"".join(map(default_tokenizer.token_bytes, ids)).decode() == " 你好 world"
    assert [default_tokenizer.token_text(token) for token in ids] == [
        " ",
        "\\xe4\\xbd",
        "\\xa0",
        "\\xe5\\xa5",
        "\\xbd",
        " world",
    ]
    assert default_tokenizer.token_text(2) == "<|im_end|>"
    assert default_tokenizer.token_bytes(10**6) == b""


def test_loading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from slipstream.server.text import load_tokenizer; load_tokenizer('default').encode('a');"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer", "adds_bos"),
    [
        (None, GPT2_SPLIT, False),
        ("gpt-2", GPT2_SPLIT, False),
        ("smollm", SMOLLM_SPLIT, False),
        ("llama-bpe", LLAMA3_SPLIT, True),
        ("llama3", LLAMA3_SPLIT, True),
        ("qwen2", QWEN2_SPLIT, False),
        ("tekken", TEKKEN_SPLIT, True),
    ],
)
def test_gguf_pre_tokenizers(
    train_byte_level: Any,
    write_byte_level: Any,
    conversation_texts: list[str],
    pre: str | None,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    adds_bos: bool,
) -> None:
    reference = train_byte_level(pre_tokenizer)
    path = write_byte_level(reference, pre)
    if pre == "qwen2":
        reference.normalizer = normalizers.NFC()
    found = load_tokenizer(path)
    texts = [*TRICKY, *conversation_texts[:60], "<|start|>text<|end|>"]
    expected = [each.ids for each in reference.encode_batch(texts)]
    assert [found.encode(text, add_special_tokens=False) for text in texts] == expected
    assert found.encode("a") == [*([0] if adds_bos else []), *found.encode("a", add_special_tokens=False)]
    assert (found.bos_token_id, found.eos_token_ids, found.special_ids) == (0, (1,), frozenset({0, 1, 2}))
    if pre not in (None, "gpt-2", "smollm", "qwen2"):
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        assert theirs(texts, add_special_tokens=False)["input_ids"] == expected


def test_gguf_boundary_flags_and_token_types(train_byte_level: Any, write_byte_level: Any) -> None:
    backend = train_byte_level(GPT2_SPLIT)
    found = load_tokenizer(write_byte_level(backend, "llama-bpe", add_bos_token=False, add_eos_token=True))
    plain = found.encode("some text", add_special_tokens=False)
    assert found.encode("some text") == [*plain, 1]
    assert load_tokenizer(write_byte_level(backend, "gpt-2", eot_token_id=2)).eos_token_ids == (1, 2)


def test_gguf_user_defined_and_padding_tokens(train_byte_level: Any, write_gguf: Any) -> None:
    backend = train_byte_level(GPT2_SPLIT)
    vocab = backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<think>", "[PAD601]"]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    types = [3] * 3 + [1] * (len(tokens) - 5) + [4, 5]
    found = load_tokenizer(write_gguf(tokens, types, merges=merges, pre="gpt-2"))
    think = len(tokens) - 2
    assert found.encode("a<think>b")[1] == think
    assert found.decode([think, think + 1]) == "<think>"  # not special, and the padding has no text
    assert think not in found.special_ids
    assert found.vocab_size == think + 1


def test_gguf_errors(write_gguf: Any, train_byte_level: Any, write_byte_level: Any) -> None:
    def expect_error(path: Path, *words: str) -> None:
        with pytest.raises(ModelError) as caught:
            load_tokenizer(path)
        for word in (str(path), *words):
            assert word in str(caught.value)

    expect_error(write_byte_level(train_byte_level(GPT2_SPLIT), "klingon"), "'klingon'", "smollm", "qwen2")
    expect_error(write_gguf(["a"], [1], model="bert"), "'bert'", "gpt2 and llama")
    expect_error(write_gguf(["a"], [1]), "no valid merges")
    expect_error(write_gguf(["a", "b"], [1, 1], merges=["a c"]), "do not fit together")
    expect_error(write_gguf(["a", "b"], [1], model="llama"), "token_type")
    expect_error(write_gguf(["a", "b"], [1, 1], model="llama"), "neither tokenizer.ggml.scores nor merges")


Write = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path, train_byte_level: Any) -> Write:
    """A folder whose tokenizer is like Llama 3's: a begin token in the post-processor, some added tokens."""

    def write(**files: Any) -> Path:
        backend = train_byte_level(LLAMA3_SPLIT)
        backend.add_tokens([AddedToken("<tool>", normalized=False)])
        template = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        backend.enable_truncation(3)
        backend.enable_padding(length=50, pad_id=2, pad_token="<|pad|>")
        backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


SPECIAL = {
    "bos_token": "<|start|>",
    "eos_token": {"content": "<|end|>", "__type": "AddedToken"},
    "pad_token": "<|pad|>",
}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": SPECIAL},
        {"special_tokens_map": {**SPECIAL, "eos_token": {"content": "<|end|>", "lstrip": False}}},
        {"tokenizer_config": {**SPECIAL, "pad_token": "<|new pad|>", "additional_special_tokens": ["<|extra|>"]}},
        {"tokenizer_config": {**SPECIAL, "extra_special_tokens": ["<|extra|>", "<|end|>"]}},
        {"tokenizer_config": {**SPECIAL, "extra_special_tokens": {"image_token": "<|extra|>"}, "add_bos_token": True}},
        {"tokenizer_config": {**SPECIAL, "image_token": "<|extra|>"}},
        {
            "tokenizer_config": {
                **SPECIAL,
                "added_tokens_decoder": {
                    "602": {"content": "<|late|>", "special": True},
                    "601": {"content": "word", "special": False, "lstrip": True, "rstrip": True, "normalized": True},
                    "600": {"content": "<tool>", "special": True},
                },
            },
            "special_tokens_map": {"eos_token": "<|pad|>"},
        },
    ],
)
def test_folder_agrees_with_transformers(write_folder: Write, conversation_texts: list[str], files: Any) -> None:
    folder = write_folder(**files)
    ours, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.vocab_size == len(theirs)
    text = "a <|start|>b <tool> c <|late|> word <|new pad|><|extra|> <|end|>"
    for each in [*TRICKY, text, *conversation_texts[:20]]:
        ids = ours.encode(each)
        assert ids == theirs(each, truncation=False, padding=False)["input_ids"]
        assert ours.encode(each, add_special_tokens=False) == theirs.encode(each, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_list_of_tokens_is_no_text(write_folder: Write) -> None:
    """Its characters would become special tokens, which answers are shown without."""
    with pytest.raises(ModelError, match=r"malformed token: .*a list of tokens is 'abc'"):
        load_tokenizer(write_folder(tokenizer_config=SPECIAL | {"additional_special_tokens": "abc"}))


def test_end_tokens_of_a_folder(write_folder: Write) -> None:
    folder = write_folder(tokenizer_config=SPECIAL, config={"eos_token_id": 5})
    assert load_tokenizer(folder).eos_token_ids == (1, 5)
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 6}}')
    assert load_tokenizer(folder).eos_token_ids == (1, 6)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert load_tokenizer(folder).eos_token_ids == (1, 7)
    template = "{% for m in messages %}{{ '<|start|>' + m.content | trim + ' <|pad|>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert load_tokenizer(folder).eos_token_ids == (1, 2, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match="eos_token_id is 'x'"):
        load_tokenizer(folder)


def test_several_end_tokens_in_any_file(write_folder: Write) -> None:
    listed = SPECIAL | {"eos_token": [SPECIAL["eos_token"], "<|start|>"]}
    folder = write_folder(tokenizer_config=listed, config={"eos_token_id": [5, 7]})
    start = load_tokenizer(folder).token_id("<|start|>")
    assert load_tokenizer(folder).eos_token_ids == (1, 5, 7, start)
    # A generation configuration that names none says nothing about the end.
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert load_tokenizer(folder).eos_token_ids == (1, 5, 7, start)


def test_chat_template_files(write_folder: Write) -> None:
    folder = write_folder(tokenizer_config={"chat_template": "one"})
    assert load_tokenizer(folder).chat_templates == {"default": "one"}
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    write_folder(tokenizer_config={"chat_template": named})
    assert load_tokenizer(folder).chat_templates == {"default": "two", "tool_use": "three"}
    write_folder(tokenizer_config={}, chat_template={"chat_template": "four"})
    assert load_tokenizer(folder).chat_template == "four"
    (folder / "chat_template.jinja").write_text("fünf", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("six")
    assert load_tokenizer(folder).chat_templates == {"default": "fünf", "rag": "six"}
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.chat_template == {"default": "fünf", "rag": "six"}


def test_folder_errors(write_folder: Write, tmp_path: Path) -> None:
    def expect_error(*words: str) -> None:
        with pytest.raises(ModelError) as caught:
            load_tokenizer(tmp_path)
        for word in (str(tmp_path), *words):
            assert word in str(caught.value)

    (tmp_path / "tokenizer.model").touch()
    expect_error("tokenizer.json was not found", "tokenizer.model", "save_pretrained")
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    expect_error("tokenizer.json is not a valid tokenizer")
    saved = Backend(models.WordLevel({"a": 0, "b": 12345}, unk_token="a")).to_str()
    (tmp_path / "tokenizer.json").write_text(saved.replace("12345", "4000000000"))
    expect_error("no vocabulary has a token 4000000000", "Download")  # and takes no memory for so many
    write_folder(tokenizer_config={"eos_token": {"text": "x"}})
    expect_error("tokenizer_config.json", "malformed")
    (tmp_path / "tokenizer_config.json").write_text("[")
    expect_error("tokenizer_config.json is not valid JSON")


fuzz = settings(max_examples=60)
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


def load_damaged(path: Path, model: Path, changes: list[tuple[float, int]], keep: float | None) -> None:
    """The tokenizer loads and works, or ModelError is raised."""
    content = path.read_bytes()
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    path.write_bytes(damaged if keep is None else damaged[: int(keep * len(damaged))])
    try:
        tokenizer = load_tokenizer(model)
    except ModelError as error:
        assert str(model) in str(error)
    else:
        assert tokenizer.token_bytes(tokenizer.vocab_size - 1) is not None
    finally:
        path.write_bytes(content)


@pytest.fixture
def gguf_files(write_sentencepiece: Any, write_byte_level: Any, train_byte_level: Any, tmp_path: Path) -> list[Path]:
    backend = train_byte_level(GPT2_SPLIT)
    return [
        write_sentencepiece().rename(tmp_path / "sentencepiece.gguf"),
        write_byte_level(backend, "gpt-2").rename(tmp_path / "byte_level.gguf"),
    ]


@fuzz
@given(changes=flips, keep=st.none() | st.floats(0, 1), which=st.integers(0, 1))
def test_damaged_gguf(gguf_files: list[Path], changes: Any, keep: Any, which: int) -> None:
    load_damaged(gguf_files[which], gguf_files[which], changes, keep)


@fuzz
@given(
    changes=flips,
    keep=st.none() | st.floats(0, 1),
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]),
)
def test_damaged_folder(write_folder: Write, tmp_path: Path, changes: Any, keep: Any, name: str) -> None:
    added = {"602": {"content": "<|late|>", "special": True}, "601": {"content": "word", "lstrip": True}}
    config = SPECIAL | {"added_tokens_decoder": added, "chat_template": [{"name": "default", "template": "{{ a }}"}]}
    if not (tmp_path / "tokenizer.json").exists():
        write_folder(tokenizer_config=config, generation_config={"eos_token_id": [1, 2]})
    load_damaged(tmp_path / name, tmp_path, changes, keep)
