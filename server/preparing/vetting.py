"""Large grammars are tried in a process that may end before the engine compiles them.

The library that compiles them bounds what a grammar may take, but for deep ones, which overflow the stack and end the
process, for long ones, which take seconds, and for large numbers that others are to be multiples of, which take
gigabytes. So up to SMALL_CHARS a grammar without such numbers goes to the engine as it is: that is too little for
either. Others come here first, in a text worker (server/preparing/text_work.py).
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from hashlib import sha256

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.compiling import check, compile_grammar, vocabulary
from slipstream.server.errors import InvalidRequestError
from slipstream.server.preparing.prepared import Structure
from slipstream.server.text import Tokenizer

SMALL_CHARS = 4096
COSTLY = re.compile(r"multipleOf|\\u")
"""What costs much however short a grammar is; escapes could write the word otherwise."""
STACK_BYTES = 4 * 2**20
"""Half of what threads of the engine have."""
STEPS = 8
COMPILE_S = 3.0
"""Processor time: on slow ones schemas of hundreds of properties take half a second. Here it harms nobody."""
MASK_S = 0.05
REMEMBERED = 4096

_known: OrderedDict[bytes, None] = OrderedDict()
"""Digests of large grammars that the engine can take."""


def is_small(grammar: str) -> bool:
    """Whether it takes little for sure."""
    return len(grammar) <= SMALL_CHARS and not COSTLY.search(grammar)


def is_known(grammar: str) -> bool:
    """Whether the engine can take it, for all that is known here."""
    if is_small(grammar):
        return True
    digest = sha256(grammar.encode("utf-8", "surrogatepass")).digest()
    if digest in _known:
        _known.move_to_end(digest)
    return digest in _known


def remember(grammar: str) -> None:
    """It was tried."""
    if not is_small(grammar):
        _known[sha256(grammar.encode("utf-8", "surrogatepass")).digest()] = None
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)


def vet(tokenizer: Tokenizer, structure: Structure) -> None:
    """Compiles a grammar and takes some steps in it. May end the process.

    Raises InvalidRequestError if that fails, or takes too long.
    """
    if is_known(structure.grammar):
        return
    failed: list[str] = []

    def try_it() -> None:
        try:
            _try(tokenizer, structure.grammar)
        except RequestError as error:
            failed.append(str(error))

    before = threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=try_it)
    thread.start()
    threading.stack_size(before)
    thread.join()
    if failed:
        raise InvalidRequestError(f"{structure.param}: {failed[0]}", param=structure.param)
    remember(structure.grammar)


def _try(tokenizer: Tokenizer, grammar: str) -> None:
    """With a token for each byte, behind those of the model, of which the special ones stay."""
    special = sorted(tokenizer.special_ids)
    tokens = [b""] * tokenizer.vocab_size + [bytes([byte]) for byte in range(256)]
    for token in special:
        tokens[token] = (tokenizer.token_name(token) or "").encode()
    known = vocabulary(tokens, special)
    began = time.thread_time()
    matcher = compile_grammar(known, grammar)
    if time.thread_time() - began > COMPILE_S:
        raise RequestError(f"it takes more than {COMPILE_S:g} s to compile")
    for _ in range(STEPS):
        began = time.thread_time()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << len(tokens)) - 1)
        check(matcher)
        if time.thread_time() - began > MASK_S:
            raise RequestError(f"it takes more than {MASK_S:g} s to find out how a text can go on")
        if not allowed:
            return
        matcher.consume_token(allowed.bit_length() - 1)
