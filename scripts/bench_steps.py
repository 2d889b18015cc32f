"""What a step costs by the positions in it: of one stream that verifies draft tokens, and of several streams.

    python scripts/bench_steps.py [--context 300] [--rounds 25] [--isa avx2]

The default model in this process: forward pass, logits of every position and a greedy token sampled from each, as a
verification needs them. All sizes take turns in every round, in changing order; prints medians as a table in Markdown,
and which share they reach of what the machine can do at most: reading the weights once, or multiplying all of them with
all positions.
"""

from __future__ import annotations

import argparse
import os
import time
from random import Random
from statistics import median

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in the engine process, and before torch is imported

import numpy as np
import torch

from slipstream.engine.config import EngineConfig
from slipstream.engine.limits import usable_cores
from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.sampler import NO_HISTORY, SamplingColumns, sample
from slipstream.engine.testing import LocalEngine
from slipstream.kernels.batch import make_batch
from slipstream.kernels.native import library, limits

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


class Bench:
    def __init__(self, context: int, dtype: str, isa: str) -> None:
        config = EngineConfig(kv_cache_memory="1GiB", dtype=dtype, speculation="off", isa=isa)
        engine = LocalEngine(config).engine
        self.runner, self.weights_bytes = engine.runner, engine.loaded.weights_bytes
        self.context = context
        self.block_size = config.block_size
        self.columns = SamplingColumns(1)
        self.columns.enter(0, SamplingParams(max_tokens=1, temperature=0.0), 0, 1)

    @torch.inference_mode()
    def seconds(self, segments: int, tokens: int) -> float:
        """A step over so many segments of so many positions that end at the context."""
        blocks = -(-self.context // self.block_size)
        batch = make_batch(
            np.zeros(segments * tokens, np.int32),
            np.full(segments, tokens, np.int32),
            np.full(segments, self.context, np.int32),
            np.arange(segments * blocks, dtype=np.int32).reshape(segments, blocks),
            np.arange(segments, dtype=np.int32),
            self.block_size,
        )
        began = time.perf_counter()
        hidden = self.runner.model.forward(batch, self.runner.cache).hidden
        logits = self.runner.model.logits(hidden, np.arange(segments * tokens, dtype=np.int32))
        rows = np.zeros(len(logits), np.int32)
        sample(logits, self.columns.take(rows, rows + 1, lambda _: NO_HISTORY))
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    options = parser.parse_args()
    bench = Bench(options.context, options.dtype, options.isa)
    sizes = [int(size) for size in options.sizes.split(",")]
    cases = [(1, size) for size in sizes] + [(size, 1) for size in sizes if size > 1]
    found: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    random = Random(0)
    for turn in range(options.rounds + 2):  # the first ones are for warming up
        random.shuffle(cases)
        for case in cases:
            seconds = bench.seconds(*case)
            if turn >= 2:
                found[case].append(seconds)
    one = median(found[1, 1])
    dtype = getattr(torch, options.dtype)
    bandwidth, flops = limits.read_bandwidth(), limits.peak_flops(dtype)
    most = f"reads {bandwidth / 1e9:.1f} GB/s, computes {flops / 1e9:.0f} GFLOP/s at most"
    print(f"{library.isa()}, {usable_cores()} cores, {options.dtype}: {most}\n")
    print("| positions | " + " | ".join(map(str, sizes)) + " |\n|---" + "|---" * len(sizes) + "|")
    for what, case in (("of one stream", lambda size: (1, size)), ("of as many streams", lambda size: (size, 1))):
        times = [median(found[case(size)]) for size in sizes]
        print(f"| {what}, ms | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in times) + " |")
        print("| … relative to one | " + " | ".join(f"{seconds / one:.2f}" for seconds in times) + " |")
        reading = [bench.weights_bytes / bandwidth / seconds for seconds in times]
        print("| … share of the bandwidth | " + " | ".join(f"{share:.0%}" for share in reading) + " |")
        operations = 2 * bench.weights_bytes / dtype.itemsize
        computing = [operations * size / flops / seconds for size, seconds in zip(sizes, times, strict=True)]
        print("| … share of the arithmetic | " + " | ".join(f"{share:.0%}" for share in computing) + " |")


if __name__ == "__main__":
    main()
