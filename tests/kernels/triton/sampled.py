"""Which variants of sampling's kernels requests have compiled that a warm-up has not, for a GPU that is not here.

Prints them as JSON: "before", by the warm-up, and "after".
"""

import json
import os
from collections.abc import Sequence

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import numpy as np
import torch
from fake_driver import TARGETS, Compiled, compile_for

from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.sampler import SamplingColumns, sample
from slipstream.engine.runner.warming import warm_up
from slipstream.kernels import ops
from slipstream.kernels.triton import launch

VOCAB, CPU = 5000, torch.device("cpu")
ASKED = (
    [{"temperature": 0.0}] * 5,
    [{}] * 16,
    [{"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 0.1, "top_k": 7}],
    [{"frequency_penalty": 0.1}] * 3,
    [{"logit_bias": {7: 1.0}, "temperature": 0.0}],
    [{"allowed_token_ids": (3, 4)}, {}],
    *([{"logprobs": count, "logprobs_mode": "processed"}] * 2 for count in (0, 3, 8, 9, 20)),
)


def ask(params: Sequence[SamplingParams]) -> None:
    columns = SamplingColumns(len(params))
    for slot, each in enumerate(params):
        columns.enter(slot, each, seed=slot, num_prompt=1)
    lengths = np.full(len(params), 4, np.int32)
    batch = columns.take(np.arange(len(params), dtype=np.int32), lengths, lambda _: np.array([1, 2, 1, 3], np.int32))
    sample(torch.zeros(len(params), VOCAB), batch)  # what comes of it is nothing, as no kernel runs


def main() -> None:
    target = TARGETS["sm_90"]
    compile_for(target)
    launch.runs_on = lambda device_type: True  # type: ignore[assignment]
    launch.capability = lambda device: target.capability  # type: ignore[assignment]
    compiled = Compiled(target, "slipstream.kernels.triton")
    found = {}
    with ops.use_backend("triton"):
        warm_up(VOCAB, CPU)
        found["before"] = [each.kernel for each in compiled.new()]
        for each in ASKED:
            ask([SamplingParams(**({"max_tokens": 9} | fields)) for fields in each])  # type: ignore[arg-type]
        found["after"] = [each.kernel for each in compiled.new()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
