"""Trees against chains of the same drafter with the same number of verified draft tokens: tokens per verification step.

    python scripts/bench_tree.py --drafter FOLDER [--budgets 4,8] [--widths 1,2,3,4] [--prompts 40] [--tokens 128]

Runs real questions through the default model in this process, greedily; every setting gives the same answers, which is
checked. A width of 1 is a chain. Drafts are not ended early, so that every step verifies the whole budget. ``--policy
throughput`` shows instead what the server would do. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from slipstream.drafter.autoregressive import AutoregressiveDrafter
from slipstream.drafter.choice import make_drafters
from slipstream.engine.checkpoint.checkpoint import locate
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams
from slipstream.engine.testing.local import LocalEngine
from slipstream.loadtest.dataset import ShareGPT
from slipstream.server.text import ChatTemplate, load_tokenizer

MOST_PROMPT_TOKENS = 400


def real_prompts(model: str, count: int, skip: int) -> list[list[int]]:
    """First questions of conversations as chat prompts, without the first ``skip`` of them."""
    tokenizer = load_tokenizer(locate(model))
    assert tokenizer.chat_template is not None, "the model has no chat template"
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    found: list[list[int]] = []
    with ShareGPT() as dataset:
        for _, conversation in dataset.conversations():
            if question := conversation.question():
                text = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
                tokens = tokenizer.encode(text, add_special_tokens=False)
                if len(tokens) <= MOST_PROMPT_TOKENS:
                    found.append(tokens)
            if len(found) == count + skip:
                break
    return found[skip:]


def measure(
    options: argparse.Namespace, prompts: list[list[int]], budget: int, width: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """What a setting brings, and the answers."""
    config = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        speculation="draft" if options.draft_model else "head",
        drafter=None if options.draft_model else options.drafter,
        draft_model=options.draft_model,
        speculation_policy=options.policy,
        max_draft_tokens=budget,
        draft_width=width,
        max_running=options.streams,
        kv_cache_memory="512MiB",
    )
    drafters = make_drafters(config)
    if options.policy == "fixed":
        for drafter in drafters:
            assert isinstance(drafter, AutoregressiveDrafter)
            drafter._stop_below = 0.0
    local = LocalEngine(config, drafters)
    began = time.perf_counter()
    done = local.generate(prompts, SamplingParams(max_tokens=options.tokens, temperature=options.temperature, seed=0))
    seconds = time.perf_counter() - began
    [stats] = local.stats.drafters
    answers = [completion.tokens for completion in done]
    steps = max(stats.drafts, 1)
    result = {
        "budget": budget,
        "width": width,
        "accept_length": round(1 + stats.accepted_tokens / steps, 3),
        "verified_per_step": round(stats.draft_tokens / steps, 2),
        "tokens_per_second": round(sum(map(len, answers)) / seconds, 1),
        "accepted_per_position": [round(count / steps, 3) for count in stats.accepted_per_position],
    }
    return result, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--drafter", default="random", help="folder of a head, or 'random'")
    parser.add_argument("--draft-model", help="a small model instead of a head")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--budgets", default="4,8", help="draft tokens verified per step")
    parser.add_argument("--widths", default="1,2,3,4")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many prompts, for example those trained on")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--policy", default="fixed", choices=("fixed", "throughput"))
    options = parser.parse_args()
    prompts = real_prompts(options.model, options.prompts, options.skip)
    report = []
    expected: list[list[int]] | None = None
    print("budget   width  tokens per verification  verified  tok/s  accepted per position")
    for budget in map(int, options.budgets.split(",")):
        for width in map(int, options.widths.split(",")):
            result, answers = measure(options, prompts, budget, width)
            assert expected is None or answers == expected, "the answers depend on the drafter"
            expected = answers
            report.append(result)
            print(
                f"{budget:7}  {width:5}  {result['accept_length']:23.3f}  {result['verified_per_step']:8.2f}"
                f"  {result['tokens_per_second']:5.1f}  {result['accepted_per_position']}",
                flush=True,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
