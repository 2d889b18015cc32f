"""Drafters that know the answers, for tests and experiments: how right they are is a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from slipstream.engine.speculation.protocol import Drafter, DraftNeeds, DraftRow, Proposal


class OracleDrafter(Drafter):
    """Knows the answers: its draft token at each place is right with a given probability, and so are those after it.

    Args:
        answers: by prompt, what the request will be told.
        right: probability that a draft token is right if those before it are; a number, or one per position.
    """

    name = "oracle"
    num_evidence = 1

    def __init__(self, answers: dict[tuple[int, ...], list[int]], right: float | Sequence[float]) -> None:
        self.answers = answers
        self.right = right
        self.salt = 0
        """What is right depends on the salt, the prompt and the place only, so that settings can be compared."""

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal | None:
        prompt = tuple(row.tokens[: row.num_prompt].tolist())
        answer = self.answers.get(prompt, [])
        begin = row.length - row.num_prompt
        drafts = answer[begin : begin + row.most]
        random = Random(hash((self.salt, prompt, begin)))
        for position in range(len(drafts)):
            right = self.right if isinstance(self.right, float) else self.right[position]
            if random.random() >= right:
                drafts[position] ^= 1  # some other token
        return Proposal.chain(drafts, 0)


class TreeOracleDrafter(Drafter):
    """Knows the answers: proposes random trees, and with a given probability the right token is among the draft tokens.

    Args:
        answers: by prompt, what the request will be told.
        right: probability that the right token is proposed after a node that is right.
        vocab: size of the vocabulary to draft from.
    """

    name = "oracle"
    num_evidence = 3
    needs = DraftNeeds(branches=True)

    def __init__(self, answers: dict[tuple[int, ...], list[int]], right: float, vocab: int) -> None:
        self.answers = answers
        self.right = right
        self.vocab = vocab

    def propose(self, rows: Sequence[DraftRow]) -> list[Proposal | None]:
        return [self._propose(row) for row in rows]

    def _propose(self, row: DraftRow) -> Proposal:
        prompt = tuple(row.tokens[: row.num_prompt].tolist())
        begin = row.length - row.num_prompt
        truth = self.answers.get(prompt, [])[begin : begin + row.most]
        random = Random(hash((prompt, begin)))
        tokens: list[int] = []
        parents: list[int] = []
        on_path = [-1]  # right nodes, from the root on
        for node in range(row.most):
            parent = on_path[-1] if random.random() < 0.6 else random.randrange(-1, node)
            taken = {tokens[i] for i in range(node) if parents[i] == parent}
            if len(taken) >= self.vocab - 1:  # one is left at least for the truth
                parent, taken = node - 1, set()
            depth = len(on_path) - 1
            if parent == on_path[-1] and depth < len(truth) and random.random() < self.right:
                on_path.append(node)
                tokens.append(truth[depth])
            else:
                if parent in on_path[: len(truth)]:
                    taken.add(truth[on_path.index(parent)])
                token = random.randrange(self.vocab)
                while token in taken:
                    token = random.randrange(self.vocab)
                tokens.append(token)
            parents.append(parent)
        return Proposal(tokens, parents, [random.randrange(3) for _ in tokens])
