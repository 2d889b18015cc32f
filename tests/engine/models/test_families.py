"""Which model families are served, and how: the table in docs/models.md is what this test finds.

families.json has a configuration of each in the form in which it is published, with small sizes. What is served must
generate what transformers generates with the same weights, alone, in a batch, chunked and from the prefix cache; what
is refused must be refused with the sentence in the table. SLIPSTREAM_WRITE_DOCS=1 writes the table anew (run it with
the slow tests: ``pytest -m "slow or not slow"``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.engine.config import EngineConfig
from slipstream.engine.errors import ModelError
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import LocalEngine

DOCS = Path(__file__).parents[3] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->"
FAMILIES: dict[str, dict[str, Any]] = {
    entry["family"]: entry for entry in json.loads(Path(__file__).with_name("families.json").read_text())
}
COUNT = 12
LENGTHS = (9, 60, 150)
"""The second outgrows the original length of the models with longrope, the third begins beyond it."""
PROMPTS = [np.random.default_rng(length).integers(5, 150, length).tolist() for length in LENGTHS]
REWRITE = bool(os.environ.get("SLIPSTREAM_WRITE_DOCS"))
Make = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    """Lines of the table by family; what a test puts in is written where that is asked for."""
    before, rest = DOCS.read_text().split(BEGIN)
    lines, after = rest.split(END)
    head, rows = lines.splitlines()[:2], lines.splitlines()[2:]
    found = {row.split("|")[1].strip(): row for row in rows}
    yield found
    if REWRITE:
        text = "\n".join([*head, *(found[name] for name in FAMILIES if name in found)])
        DOCS.write_text(f"{before}{BEGIN}{text}\n{END}{after}")


def serve(model: Any) -> LocalEngine:
    options = {"dtype": "float32", "kv_cache_memory": "2MiB", "max_step_tokens": 32}
    if model.module is None:
        options["load_format"] = "dummy"
    return LocalEngine(EngineConfig(model=str(model.folder), **options))


def runs_on(model: Any) -> str:
    """What serves the model, after it was compared with transformers; or the sentence it is refused with."""
    try:
        engine = serve(model)
    except ModelError as error:
        return "refused: " + str(error).replace(str(model.folder), "FOLDER")
    try:
        expected = [model.generate(prompt, COUNT) for prompt in PROMPTS]
        assert len({token for text in expected for token in text}) >= 2, "such texts would prove little"
        params = SamplingParams(max_tokens=COUNT, temperature=0.0)
        assert [found.tokens for found in engine.generate(PROMPTS, params)] == expected, "in a batch and chunked"
        alone = [engine.generate([prompt], params)[0] for prompt in PROMPTS]
        assert [found.tokens for found in alone] == expected, "alone"
        assert alone[-1].num_cached_tokens > 100
        return "transformers" if engine.engine.loaded.model.kernels.startswith("transformers") else "native"
    finally:
        engine.close()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if entry["fast"] else pytest.mark.slow, id=name.replace(" ", "-"))
        for name, entry in FAMILIES.items()
    ],
)
def test_family(name: str, table: dict[str, str], tiny_model: Make) -> None:
    config = FAMILIES[name]["config"]
    served = runs_on(tiny_model(config))
    kind, _, sentence = served.partition(": ")
    row = f"| {name} | `{config['model_type']}` | {kind} | {sentence} |"
    if REWRITE:
        table[name] = row
    assert table[name] == row


def test_the_table_lists_every_family(table: dict[str, str]) -> None:
    assert REWRITE or list(table) == list(FAMILIES)
