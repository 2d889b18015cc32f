"""Compiles the texts of grammars: what an engine does, and whoever tries one before. Imports next to nothing.

A grammar is a text in llguidance's notation: Lark's, or JSON with several grammars of which the first is in Lark's.
Whoever sends requests has made it of a JSON schema, a regular expression or the like. It constrains bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from slipstream.engine.errors import ConfigError, RequestError

if TYPE_CHECKING:  # else where it is needed: not every program with an engine has it
    from llguidance import LLMatcher, LLTokenizer

LIMITS: dict[str, Any] = {
    # Fuel for one mask: some 5 ms at most. What grammars of schemas take is a hundredth of it.
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    # A kilobyte or two each, per running request.
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
LONGEST_ERROR = 500
EXPLAINED = {"NoExtensionBias": "no token of the model can go on with it"}
SCHEMA_ERROR = re.compile(r"at (\d+)\(\d+\): failed to compile JSON schema: (.*?)((?:\n +\d+ \| .*)?)", re.DOTALL)
"""What is wrong with a schema; after it come lines of the grammar that was made of it, which nobody has sent."""
OWNER = "$comment"
"""A member of a schema that says whose it is, if it is the first one: "of the tool f"."""
SCHEMA_EXPLAINED = {
    r"oneOf constraints are not supported\..*": "cases of oneOf that may match the same are not supported; anyOf is",
    r"Unimplemented keys:": "without strict these would be left out, for they cannot be enforced:",
}
"""What is to be said in place of the library's words."""


def require_library() -> None:
    """Raises ConfigError where the library that compiles is not installed; does not import it."""
    if find_spec("llguidance") is None:
        raise ConfigError("answers with a structure need the package llguidance, which is not installed")


def vocabulary(tokens: Sequence[bytes], special: Sequence[int]) -> LLTokenizer:
    """What grammars are compiled for, with one token more, behind the last, which stands for the end of a text."""
    from llguidance import LLTokenizer

    return LLTokenizer(_Vocabulary(tokens, special))  # type: ignore[arg-type]  # it has what that asks for


def compile_grammar(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """Leaves the interpreter to others meanwhile.

    Raises:
        RequestError: it is no grammar, or one that would take too much.
    """
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, _unforced(text), log_level=0, limits=LLParserLimits(**LIMITS))
    if not matcher.is_error():
        # The first mask takes longest, and tells of grammars that match nothing.
        first = matcher.deep_copy()
        first.compute_bitmask()
        check(first)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raises RequestError if it can go no further."""
    if matcher.is_error():
        first = re.split(r"\n?<(?:state|non-verbose|backtrace)", matcher.get_error())[0].strip()
        if found := SCHEMA_ERROR.fullmatch(first):
            said, lines = found[2], found[3]
            owner = re.search(rf'\n +{found[1]} \| [^\n]*?%json \{{"{re.escape(OWNER)}": "([^"\n]*)"', lines)
            whose = f" {owner[1]}" if owner else ""
            for words, meaning in SCHEMA_EXPLAINED.items():
                said = re.sub(words, meaning, said, flags=re.DOTALL)
            raise RequestError(f"the JSON schema{whose} cannot be used: {said[:LONGEST_ERROR]}")
        raise RequestError(f"the grammar cannot be used: {EXPLAINED.get(first, first)[:LONGEST_ERROR]}")


class _Vocabulary:
    """What llguidance asks for of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = None
    """None: a token is added behind the last one."""

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special

    def __call__(self, text: str) -> list[int]:
        """Would be asked for the tokens of what a grammar forces; see ``_unforced``."""
        raise NotImplementedError


def _unforced(text: str) -> str:
    """The grammar, such that where it leaves no choice of bytes how they are cut into tokens is the model's choice.

    Raises RequestError.
    """
    option = '\n%llguidance {"no_forcing": true}\n'
    if not text.startswith("{"):
        return text + option
    try:
        whole = json.loads(text)
        whole["grammars"][0]["lark_grammar"] += option
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be used: {error!r}") from None
    return json.dumps(whole)
