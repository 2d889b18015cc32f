"""lm-eval with local-completions, its own tokenizer being the server's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import feature, run

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""
ROWS = [
    {"question": "The capital of France is", "choices": [" Paris", " Bern"], "answer": 0},
    {"question": "The sky is", "choices": [" green", " blue"], "answer": 1},
]


def evaluate(url: str, model: str, kind: str, **about: str) -> Any:
    folder = Path(tempfile.mkdtemp())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tiny.yaml").write_text(TASK.format(data=folder / "rows.jsonl", kind=kind, **about))
    arguments = f"model={model},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=1,max_retries=1"
    done: Any = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
         "--tasks", "tiny", "--include_path", str(folder), "--output_path", str(folder / "out")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-3000:])
    [found] = (folder / "out").rglob("results_*.json")
    return json.loads(found.read_text())["results"]["tiny"]


@feature("loglikelihood with the remote tokenizer")
def loglikelihood(url: str, model: str) -> None:
    more = 'doc_to_choice: "{{choices}}"'
    found = evaluate(url, model, "multiple_choice", target="answer", more=more, metric="acc")
    assert 0 <= found["acc,none"] <= 1


@feature("generate_until with the remote tokenizer")
def generate(url: str, model: str) -> None:
    more = 'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 8'
    found = evaluate(url, model, "generate_until", target='"{{choices[answer]}}"', more=more, metric="exact_match")
    assert "exact_match,none" in found


if __name__ == "__main__":
    run()
