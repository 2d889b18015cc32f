"""Trees of draft tokens as lists of parents: node i follows ``parents[i]`` < i, or the last known token where it is -1.

So every prefix of the lists is a tree, whose nodes lie on the same paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tree:
    tokens: Sequence[int]
    parents: Sequence[int]

    def child(self, node: int, token: int) -> int | None:
        """The draft token ``token`` after a node, or after the last known token for -1."""
        for i in range(node + 1, len(self.parents)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def accepted(self, sampled: Sequence[int]) -> list[int]:
        """The nodes that are accepted: the path of those whose tokens were sampled at their places.

        ``sampled[0]`` came after the last known token, and ``sampled[i + 1]`` after node i. A draft token is accepted
        with the probability that the target samples it, and what is kept is what the target samples: so the output is
        the same with any drafter and with none, token for token, also at temperatures above 0.
        """
        path: list[int] = []
        node = self.child(-1, sampled[0])
        while node is not None:
            path.append(node)
            node = self.child(node, sampled[node + 1])
        return path


def is_chain(parents: Sequence[int]) -> bool:
    """Whether each node follows the one before it."""
    return all(parent == node for node, parent in enumerate(parents, -1))


def depths(parents: Sequence[int]) -> list[int]:
    """Draft tokens before each node on its path."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def branches(parents: Sequence[int]) -> list[list[int]]:
    """Paths that hold each node once: they begin at the root and at every node with an older sibling."""
    if is_chain(parents):
        return [list(range(len(parents)))]
    paths: list[list[int]] = [[]]
    place = {-1: 0}
    """The path that ends with this node for now."""
    for node, parent in enumerate(parents):
        path = place.pop(parent, len(paths))
        if path == len(paths):
            paths.append([])
        paths[path].append(node)
        place[node] = path
    return paths


def affordable(parents: Sequence[int], start: int, block_size: int, blocks: int) -> tuple[list[int], int]:
    """Nodes that can be verified if branches besides the first path get so many cache blocks; the blocks they need.

    ``start`` is the position of the first draft token. Where blocks do not suffice, earlier nodes of the list go first.
    """
    kept: list[int] = []
    place = {-1: (start - 1, False)}
    """Position of each node that is kept, and whether it is on a branch."""
    followed: set[int] = set()
    used = 0
    for node, parent in enumerate(parents):
        if parent not in place:
            continue
        before, on_branch = place[parent]
        position, begins = before + 1, parent in followed
        cost = 1 if begins or (on_branch and position % block_size == 0) else 0
        if used + cost <= blocks:
            used += cost
            kept.append(node)
            place[node] = (position, on_branch or begins)
            followed.add(parent)
    return kept, used
