"""Grammars that answers follow: compiled once for each scope, and where each running request stands in its own.

A grammar (see compiling.py) constrains bytes; which tokens stand for them the engine is told once (``UseVocabulary``).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from slipstream.engine.errors import RequestError
from slipstream.engine.grammars.compiling import check, compile_grammar, require_library, vocabulary
from slipstream.engine.grammars.endings import Alphabet, Ending, Endings, Mask
from slipstream.engine.grammars.token_bytes import TokenBytes
from slipstream.engine.messages import SamplingParams
from slipstream.engine.speculation.tree import Tree

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_KEPT = 256
"""Compiled grammars that are kept though no request has them."""
MASK_S = 0.005
"""Processor time that a mask may take, on average: ambiguous grammars take more and more. Others take a tenth of it."""
FIRST_S = 0.5
"""What masks may take beyond that, all in all."""


class Compiled:
    """A grammar for one vocabulary. Nothing that requests do with it changes it."""

    __slots__ = ("__weakref__", "alphabet", "matcher")

    def __init__(self, matcher: LLMatcher, alphabet: Alphabet) -> None:
        self.matcher = matcher
        self.alphabet = alphabet


Key = tuple[str, str]
"""Whose it is (NewRequest.scope), and its text: the time to a first token is not to tell what others have asked for."""


class Grammars:
    """Compiled grammars by scope and text. ``compile`` may run beside everything else."""

    def __init__(self) -> None:
        self._told: tuple[Sequence[bytes], Sequence[int]] | None = None
        """The bytes of every token, and which are special."""
        self._vocabulary: tuple[LLTokenizer, Alphabet] | None = None
        """Made of that for the first grammar: it takes 17 MB and, for 49,000 tokens, 0.15 s."""
        self._known: WeakValueDictionary[Key, Compiled] = WeakValueDictionary()
        """Every one that anybody holds."""
        self._kept: OrderedDict[Key, Compiled] = OrderedDict()
        """The latest ones."""
        self._lock = threading.Lock()

    @property
    def has_vocabulary(self) -> bool:
        return self._told is not None

    def use(self, tokens: Sequence[bytes], special: Sequence[int], vocab_size: int) -> None:
        """Takes the bytes of every token; of those that a model with so many tokens does not have, none is taken.

        Raises ConfigError where the library that compiles grammars is not installed.
        """
        padded = TokenBytes([*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))])
        special = [token for token in special if token < vocab_size]
        require_library()
        with self._lock:
            self._told, self._vocabulary = (padded, special), None
            self._known.clear()
            self._kept.clear()

    def find(self, text: str, scope: str = "") -> Compiled | None:
        """A grammar that is compiled already."""
        with self._lock:
            if (found := self._known.get((scope, text))) is not None:
                self._keep((scope, text), found)
            return found

    def compile(self, text: str, scope: str = "") -> Compiled:
        """Takes milliseconds, for the worst grammars some hundreds, and leaves the interpreter to others meanwhile.

        Raises:
            RequestError: it is no grammar, or one that would take too much.
        """
        if (found := self.find(text, scope)) is not None:
            return found
        tokenizer, alphabet = self._made_vocabulary()
        compiled = Compiled(compile_grammar(tokenizer, text), alphabet)
        with self._lock:
            compiled = self._known.setdefault((scope, text), compiled)
            self._keep((scope, text), compiled)
        return compiled

    def constrain(self, params: SamplingParams, output: Sequence[int], scope: str = "") -> Constraint | None:
        """The constraint of a request that has said ``output`` so far; None if it has no grammar."""
        if not params.grammar:
            return None
        return Constraint(self.compile(params.grammar, scope), params, output)

    def _made_vocabulary(self) -> tuple[LLTokenizer, Alphabet]:
        with self._lock:
            assert self._told is not None, "the engine was not told the vocabulary"
            if self._vocabulary is None:
                self._vocabulary = vocabulary(*self._told), Alphabet(*self._told)
            return self._vocabulary

    def _keep(self, key: Key, compiled: Compiled) -> None:
        self._kept[key] = compiled
        self._kept.move_to_end(key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)


class _Place:
    __slots__ = ("ending", "is_narrow")

    def __init__(self, ending: Ending | None) -> None:
        self.ending = ending
        self.is_narrow: bool | None = None
        """None: its mask was not asked for."""


class Constraint:
    """Where one running request stands in its grammar: after its last known token.

    It depends on the tokens alone, not on what was looked at between them, so it allows the same tokens with draft
    tokens and without, and after a preemption.
    """

    def __init__(self, compiled: Compiled, params: SamplingParams, output: Sequence[int] = ()) -> None:
        self._matcher = compiled.matcher.deep_copy()
        self._end = compiled.alphabet.end
        self._stops = frozenset(params.stop_token_ids)
        self._min_tokens, self._max_tokens = params.min_tokens, params.max_tokens
        self._num_output = 0
        self._has_ended = False
        self._left_s = FIRST_S
        """Processor time that masks may take before what the next ones bring with them."""
        self._endings = Endings(self._matcher, compiled.alphabet) if params.ends_in_time else None
        self._places: dict[tuple[int, ...], _Place] = {}
        """What was found at places, by the tokens between the last known one and them."""
        self.is_shortened = False
        """Whether something was forbidden, at the place of a known token, because there was no time left for it."""
        self.advance(output)

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens were sampled. What follows a stop token does not count."""
        path: tuple[int, ...] = ()
        for token in tokens:
            if self._has_ended:
                break
            if self._endings is not None:
                self._place(path)  # what follows is known from there
                self.is_shortened = self.is_shortened or self._is_narrow(path)
            self._has_ended = token in self._stops
            if not self._has_ended:
                self._matcher.consume_token(token)  # if that fails, the next mask says so
                path = (*path, token)
        if self._endings is not None and not self._has_ended:
            self._places = {(): self._place(path)}
        self._num_output += len(tokens)

    def masks(self, tree: Tree | None = None) -> list[Mask | None]:
        """What is allowed after the last known token, and after each node of a tree of permitted draft tokens.

        None where everything is, because nothing that follows counts. Raises RequestError where it takes too much.
        """
        if self._has_ended:
            return [None] * (1 + (len(tree.tokens) if tree is not None else 0))
        found: list[Mask | None] = [self._mask(())]
        if tree is None:
            return found
        paths: dict[int, list[int]] = {-1: []}
        """Nodes from the root on, by the last one."""
        consumed: list[int] = []
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            if token in self._stops:
                found.append(None)
                continue
            path = paths[node] = [*paths[parent], node]
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, consumed, strict=False)))
            self._matcher.rollback(len(consumed) - same)
            self._matcher.consume_tokens([tree.tokens[each] for each in path[same:]])
            consumed = path
            found.append(self._mask(tuple(tree.tokens[each] for each in path)))
        self._matcher.rollback(len(consumed))
        return found

    def permitted(self, tree: Tree) -> list[int]:
        """The nodes whose tokens the grammar allows at their places; nothing follows a stop token."""
        if self._has_ended:
            return []
        paths: dict[int, list[int]] = {-1: []}
        kept: list[int] = []
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            if (before := paths.get(parent)) is None:
                continue
            if token in self._stops:
                kept.append(node)
                continue
            path = [*before, token]
            if self._matcher.validate_tokens(path) == len(path):
                paths[node] = path
                kept.append(node)
        return kept

    def _mask(self, path: tuple[int, ...]) -> Mask:
        """After these draft tokens behind the last known token, where the matcher is."""
        began = time.thread_time()
        mask = np.frombuffer(bytearray(self._matcher.compute_bitmask()), np.uint8)
        check(self._matcher)
        if self._endings is not None:
            place, left = self._place(path), self._max_tokens - self._num_output - len(path)
            whole, mask = mask, self._endings.fitting(mask, place.ending, left)
            place.is_narrow = mask is not whole
            check(self._matcher)
        self._left_s += MASK_S - (time.thread_time() - began)
        if self._left_s < 0:
            raise RequestError(
                f"the grammar cannot be used: it takes more than {1000 * MASK_S:g} ms per token to follow"
            )
        may_end = _take_bit(mask, self._end)
        if self._num_output + len(path) < self._min_tokens:
            longer = mask.copy()
            for stop in self._stops:
                _take_bit(longer, stop)
            if longer.any():
                return longer
        if may_end:  # also before min_tokens, where the grammar has nothing more to say
            for stop in self._stops:
                mask[stop >> 3] |= 1 << (stop & 7)
        return mask

    def _place(self, path: tuple[int, ...]) -> _Place:
        """What is known of the place after these draft tokens, where the matcher is."""
        assert self._endings is not None
        if (found := self._places.get(path)) is None:
            before = self._places[path[:-1]].ending if path else None
            left = self._max_tokens - self._num_output - len(path)
            found = self._places[path] = _Place(self._endings.after(before, path[-1] if path else None, left))
        return found

    def _is_narrow(self, path: tuple[int, ...]) -> bool:
        """Whether not all that the grammar allows had time to be ended there."""
        place = self._place(path)
        if place.is_narrow is None:  # said before a preemption
            try:
                self._mask(path)
            except RequestError:  # the next mask says so
                return False
        return bool(place.is_narrow)


def _take_bit(mask: Mask, bit: int) -> bool:
    """Clears a bit; whether it was set."""
    was_set = bool(mask[bit >> 3] >> (bit & 7) & 1)
    mask[bit >> 3] &= ~(1 << (bit & 7)) & 0xFF
    return was_set
