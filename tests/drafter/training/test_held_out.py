"""Which texts hardly differ."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from slipstream.drafter.training.held_out import ALIKE, WINDOW, HeldOut, alike
from slipstream.drafter.training.packing import Example

ids = st.integers(0, 50_000)
answers = st.lists(ids, min_size=12, max_size=60, unique=True)


def text(prompt: list[int], answer: list[int]) -> Example:
    return Example(np.array(prompt + answer, np.int32), len(prompt), 0, torch.zeros(len(prompt) + len(answer), 1, 1))


def kinds(*texts: Example) -> list[list[int]]:
    found = alike(texts)
    return sorted([int(at) for at in np.flatnonzero(found == kind)] for kind in set(found.tolist()))


@given(answers, answers)
def test_the_same_prompt_is_the_same_text(one: list[int], other: list[int]) -> None:
    assert kinds(text([1, 2], one), text([1, 3], []), text([1, 2], other), text([1, 3], [5])) == [[0, 2], [1, 3]]


@given(answers, st.data())
def test_an_answer_with_a_word_changed_is_the_same_text(answer: list[int], data: st.DataObject) -> None:
    """At its begin or end, or after other words; a change in the middle of a short one takes too much of it."""
    changed = list(answer)
    changed[data.draw(st.sampled_from([0, 1, -1, -2]))] = 60_000
    longer = [60_001, 60_002, *answer, 60_003]
    assert kinds(text([1], answer), text([2], changed), text([3], longer)) == [[0, 1, 2]]


@given(st.lists(ids, min_size=24, max_size=80, unique=True))
def test_other_words_are_another_text_whatever_they_begin_with(words: list[int]) -> None:
    half = len(words) // 2
    one, other = words[:half], words[half : 2 * half]
    frame = [60_000 + number for number in range(half // 4)]
    assert kinds(text([1], frame + one), text([2], frame + other)) == [[0], [1]]


def test_different_texts_are_counted_once() -> None:
    answer = list(range(100, 130))
    texts = [text([number], answer) for number in range(5)] + [text([9], list(range(200, 230))), text([10], [3])]
    assert HeldOut(texts, np.ones(7)).different == 3
    assert HeldOut([], np.ones(0)).different == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 20)), max_size=12))
def test_kinds_are_those_of_all_pairs(drawn: list[tuple[int, int, int]]) -> None:
    """Also for what repeats itself: slices of one long text."""
    texts = [text([prompt], list(range(3 * begin, 3 * begin + length))) for prompt, begin, length in drawn]

    def pair(one: Example, other: Example) -> bool:
        runs = [{tuple(t.tokens[i : i + WINDOW]) for i in range(1, len(t.tokens) - WINDOW + 1)} for t in (one, other)]
        shortest = min(map(len, runs))
        return one.tokens[0] == other.tokens[0] or (shortest > 0 and len(runs[0] & runs[1]) >= ALIKE * shortest)

    groups = [{at} for at in range(len(texts))]
    for at, one in enumerate(texts):
        for before in range(at):
            if pair(one, texts[before]):
                joined = [group for group in groups if at in group or before in group]
                groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    assert kinds(*texts) == sorted(sorted(group) for group in groups)
