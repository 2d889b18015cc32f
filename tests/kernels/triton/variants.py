"""Which variants of kernels are compiled for a GPU that is not here, as JSON.

"before": of sampling's, by the warm-up, and "after", by requests; "rows": by steps of several numbers of tokens.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import numpy as np
import torch
from fake_driver import TARGETS, Compiled, compile_for

from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.sampler import SamplingColumns, sample
from slipstream.engine.runner.warming import warm_up_sampling
from slipstream.kernels import ops
from slipstream.kernels.triton import activation, launch, norm

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
        warm_up_sampling(VOCAB, CPU)
        found["before"] = [each.kernel for each in compiled.new()]
        for each in ASKED:
            ask([SamplingParams(**({"max_tokens": 9} | fields)) for fields in each])  # type: ignore[arg-type]
        found["after"] = [each.kernel for each in compiled.new()]
    for tokens in (1, 2, 5, 16, 40, 300, 2048):
        x, both = torch.empty(2, tokens, 64), torch.empty(tokens, 2 * 96)
        norm.rms_norm(x[0], x[0, 0], 1e-5)
        norm.add_rms_norm(x[0], x[1], x[0, 0], 1e-5)
        activation.silu_mul_halves(both)
    found["rows"] = [each.kernel for each in compiled.new()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
