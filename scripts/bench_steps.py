"""What a step costs by the positions in it: of one stream that verifies draft tokens, and of several streams.

    python scripts/bench_steps.py [--context 300] [--rounds 25] [--isa avx2] [--forms bfloat16,rounded,exact,int16,int8]

A model in this process: forward pass, logits of every position and a greedy token sampled from each, as a verification
needs them. All sizes, and all forms of weights, take turns in every round, in changing order; prints medians as tables
in Markdown, and which share they reach of what the machine can do at most: reading the weights once, or multiplying all
of them with all positions.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Mapping
from random import Random
from statistics import median
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in the engine process, and before torch is imported

import numpy as np
import torch
from perplexity import FORMS

from slipstream.engine.checkpoint.checkpoint import open_checkpoint
from slipstream.engine.checkpoint.shapes import parameter_shapes
from slipstream.engine.config import EngineConfig
from slipstream.engine.limits import usable_cores
from slipstream.engine.messages import SamplingParams
from slipstream.engine.runner.sampler import SamplingColumns, sample
from slipstream.engine.testing.local import LocalEngine
from slipstream.kernels.batch import make_batch
from slipstream.kernels.native import library, limits

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)


FORMS["rounded"] = {"weights": "packed", "packed_arithmetic": "bfloat16"}
ARITHMETIC = {
    "float32": (torch.float32, 1),
    "bfloat16": (torch.bfloat16, 1),
    "exact": (torch.float32, 1),
    "int16": (torch.int8, 2),
    "int8": (torch.int8, 1),
}
"""As which numbers weights are multiplied, and how often."""


NO_TOKENS = np.zeros(0, np.int32)


def multiplied(form: str) -> tuple[torch.dtype, int]:
    options = FORMS[form]
    return ARITHMETIC[options.get("packed_arithmetic") or options["weights"]]


class Bench:
    def __init__(self, context: int, model: Mapping[str, Any], form: str, isa: str, clock: limits.Clock) -> None:
        threads = 0 if clock is time.perf_counter else 1
        options: dict[str, Any] = {"kv_cache_memory": "1GiB", "speculation": "off", "threads": threads, "isa": isa}
        config = EngineConfig(**model, **options, **FORMS[form])
        self.clock = clock
        engine = LocalEngine(config).engine
        self.runner, self.loaded = engine.runner, engine.loaded
        self.elements = sum(math.prod(shape) for _, shape in parameter_shapes(open_checkpoint(model["model"]).config))
        self.context = context
        self.block_size = config.block_size
        self.columns = SamplingColumns(1)
        self.columns.enter(0, SamplingParams(max_tokens=1, temperature=0.0), 0, 1)
        self._filled = 0

    def _fill(self, blocks: int) -> None:
        """Writes keys and values to the first blocks: what nobody wrote is one page of zeros, and read from a cache."""
        if blocks <= self._filled:
            return
        count, size, cache = np.array([blocks * self.block_size], np.int32), self.block_size, self.runner.cache
        table = np.arange(blocks, dtype=np.int32)[None]
        plan = cache.plan(make_batch(np.zeros(count[0], np.int32), count, count, table, np.zeros(1, np.int32), size))
        kv = torch.randn(2, count[0], cache.shape.kv_heads, cache.shape.head_dim)
        for layer in range(cache.shape.num_layers):
            plan.store(layer, *kv)
        self._filled = blocks

    @torch.inference_mode()
    def seconds(self, segments: int, tokens: int) -> float:
        """A step over so many segments of so many positions that end at the context."""
        if tokens > self.context:
            raise SystemExit(f"{tokens} positions of one stream are more than its {self.context}: --context {tokens}")
        blocks = -(-self.context // self.block_size)
        if segments * blocks > self.runner.cache.num_blocks:
            raise SystemExit(f"the cache has no room for {segments} streams of {self.context} tokens: fewer --sizes")
        self._fill(segments * blocks)
        batch = make_batch(
            np.zeros(segments * tokens, np.int32),
            np.full(segments, tokens, np.int32),
            np.full(segments, self.context, np.int32),
            np.arange(segments * blocks, dtype=np.int32).reshape(segments, blocks),
            np.arange(segments, dtype=np.int32),
            self.block_size,
        )
        began = self.clock()
        hidden = self.runner.model.forward(batch, self.runner.cache).hidden
        logits = self.runner.model.logits(hidden, np.arange(segments * tokens, dtype=np.int32))
        rows = np.zeros(len(logits), np.int32)
        sample(logits, self.columns.take(rows, rows + 1, lambda _: NO_TOKENS)).wait()
        return self.clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", default="default")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for a folder of config.json only")
    parser.add_argument("--forms", default="bfloat16,rounded,exact,int16,int8", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--isa", default="auto")
    parser.add_argument(
        "--one-thread", action="store_true", help="by its processor time, in which others on the machine do not count"
    )
    parser.add_argument("--chunks", action="store_true", help="positions of one stream only, as those of prompts")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    options = parser.parse_args()
    forms = options.forms.split(",")
    clock = time.thread_time if options.one_thread else time.perf_counter
    model = {"model": options.model, "load_format": options.load_format}
    benches = {form: Bench(options.context, model, form, options.isa, clock) for form in forms}
    sizes = [int(size) for size in options.sizes.split(",")]
    cases = [(form, *case) for form in forms for case in shapes(sizes, options.chunks)]
    found: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    random = Random(0)
    for turn in range(options.rounds + 2):  # the first ones are for warming up
        random.shuffle(cases)
        for form, segments, tokens in cases:
            seconds = benches[form].seconds(segments, tokens)
            if turn >= 2:
                found[form, segments, tokens].append(seconds)
    bandwidth = limits.read_bandwidth(clock)
    peaks = {dtype: limits.peak_flops(dtype, clock) for dtype, _ in map(multiplied, forms)}
    computes = ", ".join(f"{peak / 1e9:.0f} of {str(dtype).removeprefix('torch.')}" for dtype, peak in peaks.items())
    most = f"reads {bandwidth / 1e9:.1f} GB/s, computes 10^9 operations per second: {computes}"
    print(f"{library.isa()}, {1 if options.one_thread else usable_cores()} threads, at most: {most}")
    for form in forms:
        one = median(found[form, 1, 1])
        loaded, (dtype, often) = benches[form].loaded, multiplied(form)
        operations = 2 * often * benches[form].elements
        print(f"\n{form}: {loaded.weights}, {loaded.weights_bytes / 1e6:.0f} MB\n")
        print("| positions | " + " | ".join(map(str, sizes)) + " |\n|---" + "|---" * len(sizes) + "|")
        rows = (("of one stream", lambda size: (1, size)), ("of as many streams", lambda size: (size, 1)))
        for what, case in rows[: 1 if options.chunks else 2]:
            times = [median(found[form, *case(size)]) for size in sizes]
            print(f"| {what}, ms | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in times) + " |")
            print("| … relative to one | " + " | ".join(f"{seconds / one:.2f}" for seconds in times) + " |")
            reading = [loaded.weights_bytes / bandwidth / seconds for seconds in times]
            print("| … share of the bandwidth | " + " | ".join(f"{share:.0%}" for share in reading) + " |")
            computing = [operations * size / peaks[dtype] / seconds for size, seconds in zip(sizes, times, strict=True)]
            print("| … share of the arithmetic | " + " | ".join(f"{share:.0%}" for share in computing) + " |")


def shapes(sizes: list[int], chunks: bool) -> list[tuple[int, int]]:
    """Streams, and positions of each; of one stream only if they are ``chunks``."""
    return [(1, size) for size in {1, *sizes}] + [(size, 1) for size in sizes if size > 1 and not chunks]


if __name__ == "__main__":
    main()
