import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.drafter.training.packing import Example, fill, pack


def text(length: int, num_prompt: int, start: int, seed: int) -> Example:
    tokens = np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)
    positions = torch.arange(start, length - 1).float()
    return Example(tokens, num_prompt, start, positions[:, None, None].expand(-1, 2, 4))


texts = st.builds(
    lambda length, prompt, start, seed: text(length, min(prompt, length - 1), min(start, length - 1), seed),
    st.integers(2, 40),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 99),
)


@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 4))
@settings(max_examples=100)
def test_features_of_p_and_the_token_after_it_predict_the_one_after_that(examples: list[Example], steps: int) -> None:
    groups = list(fill(examples, 50, 30))
    for group in groups:
        batch = pack(group, steps)
        learned = batch.learned.tolist()
        at = 0
        for example, segment in zip(group, batch.segments, strict=True):
            for row in range(segment.begin, segment.end):
                position = int(batch.positions[row])
                assert position == example.start + row - segment.begin
                assert batch.features[row, 0, 0] == position, "features are those of the position"
                expected = [
                    int(example.tokens[position + 1 + i]) if position + 1 + i < len(example.tokens) else 0
                    for i in range(steps + 1)
                ]
                assert batch.tokens[row].tolist() == expected
                if row >= segment.learned:
                    assert learned[at] == row
                    after = [position + 2 + i for i in range(steps)]
                    assert batch.targets[at].tolist() == [
                        int(example.tokens[p]) if p < len(example.tokens) else -1 for p in after
                    ]
                    assert after[0] > example.num_prompt, "the first draft token follows the first token of the answer"
                    at += 1
                else:
                    assert position + 2 <= example.num_prompt
        assert at == len(learned)


@given(st.lists(texts, min_size=1, max_size=8))
@settings(max_examples=50)
def test_groups_hold_every_text_once_and_stay_small(examples: list[Example]) -> None:
    groups = list(fill(examples, 40, 25))
    useful = [e for e in (example.cut(25) for example in examples) if e.length > e.num_context]
    assert [tuple(e.tokens) for group in groups for e in group] == [tuple(e.tokens) for e in useful]
    for group in groups:
        assert len(group) == 1 or sum(e.length for e in group) <= 40
        assert all(e.length <= 25 for e in group)


def test_the_targets_most_likely_tokens_go_with_their_places() -> None:
    tokens = np.arange(12, dtype=np.int32)
    ids = np.arange(100, 107, dtype=np.int32)[:, None]
    example = Example(tokens, 5, 0, torch.zeros(11, 2, 4), (ids, np.zeros((7, 1), np.float32)))
    batch = pack([example], 2)
    assert batch.likely is not None
    # Entry i of the answer belongs to token num_prompt + i.
    expected = [[95 + t if t >= 0 else -1 for t in row] for row in batch.targets.tolist()]
    assert batch.likely[0][..., 0].tolist() == expected
