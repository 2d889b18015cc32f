"""GGUF files whose pre-tokenizers few models have: texts are split as tokenizer.json of these models does."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from slipstream.server.text import load_tokenizer

TRICKY = [
    "\n\n  indented\ttabs\r\n",
    "It's 12345 o'clock, WE'LL see: don't!",
    "HelloWorld iPhone ABC'S 3.14159 1,000,000!!!\n",
    "naïve café — “quotes” … ½ ② Ⅳ",
    "你好，世界 👩‍👩‍👧 नमस्ते \u0301combining",
    "trailing  ",
]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def split(*patterns: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


LLAMA3 = [
    *split(ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    BYTES,
]
GPT4O = [
    *split(
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{ENDING}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{ENDING}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    BYTES,
]
DEEPSEEK_CODER = [*split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES]
GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]


@pytest.mark.parametrize(
    ("pre", "steps", "adds_bos"),
    [
        ("falcon3", LLAMA3, True),
        ("dbrx", LLAMA3, False),
        ("smaug-bpe", LLAMA3, False),
        ("refact", [DIGITS, *GPT2], False),
        ("starcoder", [DIGITS, *GPT2], False),
        ("olmo", GPT2, False),
        ("gpt-4o", GPT4O, False),
        ("deepseek-coder", DEEPSEEK_CODER, False),
    ],
)
def test_words_are_those_of_the_models_own_tokenizer(
    train_byte_level: Any,
    write_byte_level: Any,
    conversation_texts: list[str],
    pre: str,
    steps: list[Any],
    adds_bos: bool,
) -> None:
    reference = train_byte_level(pre_tokenizers.Sequence(steps))
    found = load_tokenizer(write_byte_level(reference, pre))
    texts = [*TRICKY, *conversation_texts[:60]]
    expected = [each.ids for each in reference.encode_batch(texts)]
    assert [found.encode(text, add_special_tokens=False) for text in texts] == expected
    assert (found.encode("a")[0] == found.bos_token_id) == adds_bos
