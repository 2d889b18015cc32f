"""The drafters of known acceptance, by which the others and the controller are judged."""

from __future__ import annotations

import math

import numpy as np

from slipstream.engine.speculation.oracles import OracleDrafter
from slipstream.engine.speculation.protocol import DraftRow


def test_drafts_are_right_as_often_as_told_on_every_walk() -> None:
    """Answers are walked as in decoding: the next draft tokens start behind the first one that was wrong."""
    right = [0.6, 0.55, 0.5, 0.45]
    answer = list(range(128))
    tried, hits = np.zeros(4), np.zeros(4)
    oracle = OracleDrafter({}, right)
    for oracle.salt in range(100):
        prompt = [1, 2, oracle.salt]
        oracle.answers = {tuple(prompt): answer}
        begin = 1
        while begin < len(answer) - 4:
            tokens = np.array([*prompt, *answer[:begin]], np.int32)
            (proposal,) = oracle.propose([DraftRow(0, "", 3, tokens, len(tokens), frozenset({"oracle"}), most=4)])
            assert proposal is not None
            for place, (draft, truth) in enumerate(zip(proposal.tokens, answer[begin:], strict=False)):
                tried[place] += 1
                hits[place] += draft == truth
                begin += 1
                if draft != truth:
                    break
            else:
                begin += 1
    for place, chance in enumerate(right):
        error = math.sqrt(chance * (1 - chance) / tried[place])
        assert abs(hits[place] / tried[place] - chance) < 4.5 * error, (place, hits / tried)
