"""Trees of draft tokens: how they are cut into branches, and that verifying one is plain decoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.engine.models.config import decoder_config
from slipstream.engine.models.decoder import Decoder
from slipstream.engine.models.loader import COMPUTES
from slipstream.engine.models.protocol import CausalModel
from slipstream.engine.models.weights import load
from slipstream.engine.runner.trees import BranchSegments
from slipstream.engine.speculation.scratch import Scratch
from slipstream.engine.speculation.tree import Tree, affordable, branches, depths
from slipstream.engine.testing.local import policy
from slipstream.kernels.batch import make_batch
from slipstream.kernels.compute import Formats
from slipstream.kernels.native.library import isa

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
KERNELS = ["torch", *(["native"] if isa() else [])]


def parents(most: int) -> st.SearchStrategy[list[int]]:
    return st.integers(1, most).flatmap(
        lambda n: st.tuples(*(st.integers(-1, node - 1) for node in range(n))).map(list)
    )


@given(parents(12))
def test_branches_hold_every_node_once_behind_its_parent(tree: list[int]) -> None:
    paths = branches(tree)
    assert sorted(node for path in paths for node in path) == list(range(len(tree)))
    for path in paths:
        assert all(tree[after] == before for before, after in pairwise(path))
    assert paths[0][0] == 0
    leaves = set(range(len(tree))) - set(tree)
    assert {path[-1] for path in paths} == leaves
    for prefix in range(1, len(tree)):
        cut = [[node for node in path if node < prefix] for path in paths]
        assert branches(tree[:prefix]) == [path for path in cut if path], "a prefix has the same branches"


@given(parents(12), st.integers(1, 60), st.integers(0, 12))
def test_what_is_affordable_fits(tree: list[int], start: int, blocks: int) -> None:
    kept, used = affordable(tree, start, 16, blocks)
    assert used <= blocks
    place = {-1: -1} | {node: at for at, node in enumerate(kept)}
    cut = [place[tree[node]] for node in kept]
    scratch = Scratch(np.zeros((used, 10), np.int32), 0, used, 16)
    positions = [start + depth for depth in depths(cut)]
    for path in branches(cut)[1:]:
        assert scratch.fork(0, positions[path[0]], positions[path[-1]]) is not None
    assert scratch.fork(0, 0, 0) is None, "exactly so many are used"
    if 2 * len(tree) <= blocks:
        assert kept == list(range(len(tree)))


@pytest.fixture(scope="module", params=KERNELS)
def model(request: pytest.FixtureRequest) -> CausalModel:
    config = decoder_config(CONFIG)
    compute = COMPUTES[request.param](Formats.of(torch.float32), torch.device("cpu"))
    made = Decoder(config, compute, 512)
    load(made, policy(0, CONFIG).items())
    return made


@settings(max_examples=30)
@given(
    tree=parents(9),
    length=st.integers(1, 50),
    new=st.integers(1, 20),
    block_size=st.sampled_from([16, 32]),
    seed=st.integers(0, 99),
)
@torch.inference_mode()
def test_every_node_gets_what_plain_decoding_computes(
    model: CausalModel, tree: list[int], length: int, new: int, block_size: int, seed: int
) -> None:
    """To the bit with the compiled kernels; and the cells of accepted nodes hold it, too."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 32, length).astype(np.int32)
    drafts = Tree(rng.integers(0, 32, len(tree)).tolist(), tree)
    start = max(length - new, 0)
    width, spare = 8, 24
    tables = np.zeros((2 + spare, width), np.int32)
    tables[:2] = rng.permutation(2 * width).reshape(2, width)
    cache = model.new_cache(2 * width + spare, block_size)
    scratch = Scratch(tables, 2 * width, spare, block_size)

    def run(
        ids: np.ndarray, counts: list[int], ends: list[int], rows: list[int], mirrors: list[object]
    ) -> torch.Tensor:
        columns = (np.array(column, np.int32) for column in (ids, counts, ends))
        batch = make_batch(
            *columns, tables, np.array(rows, np.int32), block_size, np.array(mirrors, np.int32).reshape(-1, 3)
        )
        hidden = model.forward(batch, cache).hidden
        return model.logits(hidden, np.arange(len(ids), dtype=np.int32)).clone()

    if start:
        run(known[:start], [start], [start], [1], [])
    first = branches(tree)[0]
    own = [*known[start:], *(drafts.tokens[node] for node in first)]
    added = BranchSegments(scratch, len(own))
    placed = added.place(drafts, branches(tree), 1, start, length, length - start - 1)
    if added.copies:
        cache.copy_blocks(added.copies)
    logits = run(
        np.array([*own, *added.token_ids]),
        [len(own), *added.counts],
        [length + len(first), *added.ends],
        [1, *added.table_rows],
        added.mirrors,
    )
    row_of_tokens = np.zeros(100, np.int32)
    row_of_tokens[: length + len(first)] = [*known, *own[length - start :]]
    for node, history in enumerate(placed.histories(row_of_tokens)):
        path = [node]
        while tree[path[0]] >= 0:
            path.insert(0, tree[path[0]])
        assert history.tolist() == [*known, *(drafts.tokens[i] for i in path)]
        plain = run(history, [len(history)], [len(history)], [0], [])[-1]
        got = logits[placed.batch_rows[node]]
        assert torch.equal(got, plain) if model.kernels.startswith("native") else torch.allclose(got, plain, atol=1e-3)

    node = int(rng.integers(0, len(tree)))
    path = [node]
    while tree[path[0]] >= 0:
        path.insert(0, tree[path[0]])
    history = placed.histories(row_of_tokens)[node]
    positions = [placed.positions[i] for i in path]
    source = scratch.cells([placed.table_rows[i] for i in path], positions).tolist()
    cache.copy_cells(list(zip(source, scratch.cells([1] * len(path), positions).tolist(), strict=True)))
    after = run(np.array([5]), [1], [len(history) + 1], [1], [])[-1]
    plain = run(np.append(history, 5), [len(history) + 1], [len(history) + 1], [0], [])[-1]
    assert torch.equal(after, plain) if model.kernels.startswith("native") else torch.allclose(after, plain, atol=1e-3)
