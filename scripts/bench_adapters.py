"""What LoRAs beside the model cost: requests without one, all with the same one, and each with its own, in turns.

    python scripts/bench_adapters.py [--model default] [--streams 1,8] [--rank 16] [--rounds 8]

One engine with the settings of the server but without speculation and prefix caching, real prompts, 64 greedy tokens.
The LoRAs are random, for all matrices of layers. Prints tokens per second, and each way's share of the speed without:
median of the rounds, and range.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median

from bench_tree import real_prompts

from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.operations import LoadAdapter
from slipstream.engine.testing.local import LocalEngine
from slipstream.engine.testing.lora import random_lora, write_lora

TOKENS = 64
WAYS = ("none", "one", "own")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    counts = list(map(int, options.streams.split(",")))
    local = LocalEngine(
        EngineConfig(model=options.model, speculation="off", kv_cache_memory="256MiB", prefix_caching=False)
    )
    decoder = local.engine.loaded.model.decoder
    assert decoder is not None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(max(counts)):
            lora = random_lora(decoder.weight_shapes, options.rank, number, size=0.001)
            path = write_lora(Path(folder, str(number)), lora)
            local.operate(LoadAdapter(str(number), str(path)))
    prompts = real_prompts(options.model, sum(counts) * (options.rounds + 1), 500)
    params = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS, temperature=0.0)
    random = Random(0)
    for streams in counts:
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds + 1):
            asked, prompts = prompts[:streams], prompts[streams:]
            for way in random.sample(WAYS, len(WAYS)):
                names = {"none": [""] * streams, "one": ["0"] * streams, "own": list(map(str, range(streams)))}[way]
                began = time.perf_counter()
                for prompt, name in zip(asked, names, strict=True):
                    local.submit(prompt, params, adapter=name)
                local.finish()
                if number:  # the first round warms up
                    seconds[way].append(time.perf_counter() - began)
        for way in WAYS:
            shares = [none / mine for none, mine in zip(seconds["none"], seconds[way], strict=True)]
            speed = streams * TOKENS / median(seconds[way])
            print(
                f"{streams} streams, {way}: {speed:.1f} tokens/s, {median(shares):.3f} "
                f"({min(shares):.3f} – {max(shares):.3f}) of none",
                flush=True,
            )
    local.close()


if __name__ == "__main__":
    main()
