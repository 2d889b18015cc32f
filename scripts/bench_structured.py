"""Answers with a structure: are they valid, what does a constrained step cost, how late is a schema never seen before?

The schemas are those of functions of the Berkeley Function-Calling Leaderboard: of the package bfcl-eval (``pip install
--no-deps bfcl-eval``), or of ``--data``, its folder of data; jsonschema checks the answers. Prints one line of JSON for
each of the three questions, and the ends of answers that were cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from slipstream.drafter.choice import make_drafters
from slipstream.engine.config import EngineConfig
from slipstream.engine.messages import SamplingParams, SpeculationParams
from slipstream.engine.operations import UseVocabulary
from slipstream.engine.testing.local import Completion, LocalEngine
from slipstream.server.structured import json_grammar
from slipstream.server.text import ChatTemplate, load_tokenizer

FILES = ("simple_python", "multiple", "live_simple", "live_multiple", "parallel")
TYPES = {"dict": "object", "float": "number", "double": "number", "tuple": "array", "list": "array", "int": "integer"}
OFF = SpeculationParams("off")


def schema_of(found: Any) -> Any:
    """A JSON schema of what the leaderboard calls one."""
    if isinstance(found, list):
        return [schema_of(each) for each in found]
    if not isinstance(found, dict):
        return found
    kept = {name: schema_of(value) for name, value in found.items() if name not in ("optional", "default")}
    kind = kept.get("type")
    if isinstance(kind, str):
        kind = TYPES.get(kind.lower(), kind.lower())
        if kind == "any":
            kept.pop("type")
        else:
            kept["type"] = kind
    return kept


def functions(data: Path, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Questions, each with the schema of the arguments of a function; no schema twice."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in FILES:
        for line in (data / f"BFCL_v4_{name}.json").read_text().splitlines():
            entry = json.loads(line)
            question = entry["question"][0][-1]["content"]
            for function in entry["function"]:
                schema = schema_of(function["parameters"])
                told = f"{question}\nAnswer with the arguments of {function['name']}: {function['description']}"
                found.setdefault(json.dumps(schema), (told, schema))
    step = max(len(found) // count, 1)
    return list(found.values())[::step][:count]


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        config = EngineConfig(model=options.model, kv_cache_memory="512MiB", max_running=options.running)
        self.engine = LocalEngine(config, make_drafters(config))
        self.tokenizer = load_tokenizer(options.model)
        special = sorted(self.tokenizer.special_ids)
        self.engine.engine.operate(UseVocabulary(self.tokenizer.all_bytes(), special))
        self.template = ChatTemplate(self.tokenizer.chat_template or "", self.tokenizer.special_tokens)
        self.stop = self.tokenizer.eos_token_ids

    def prompt(self, text: str) -> list[int]:
        rendered = self.template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def params(self, schema: Any, **fields: Any) -> SamplingParams:
        grammar = json_grammar(schema, "schema", best_effort=True) if schema is not None else ""
        return SamplingParams(
            stop_token_ids=self.stop if grammar else (), grammar=grammar, ends_in_time=bool(grammar), **fields
        )

    def text(self, done: Completion) -> str:
        return self.tokenizer.decode(done.tokens)

    def valid(self, asked: list[tuple[str, dict[str, Any]]], most: int, temperature: float) -> dict[str, Any]:
        """How many of the answers match their schemas."""
        began = time.perf_counter()
        params = [self.params(schema, max_tokens=most, temperature=temperature, seed=1) for _, schema in asked]
        prompts = [self.prompt(text) for text, _ in asked]
        done = [self.engine.submit(*each) for each in zip(prompts, params, strict=True)]
        self.engine.finish()
        counts = {"valid": 0, "brought to their end": 0, "wrong": 0, "cut off": 0, "refused": 0}
        for (_, schema), answer in zip(asked, done, strict=True):
            counts[verdict(schema, self.text(answer), answer)] += 1
            counts["brought to their end"] += answer.deltas[-1].is_shortened
        steps = sum(len(answer.deltas) for answer in done)
        tokens = sum(len(answer.tokens) for answer in done)
        drafted = sum(delta.num_drafted for answer in done for delta in answer.deltas)
        accepted = sum(delta.num_accepted for answer in done for delta in answer.deltas)
        return {
            **{"temperature": temperature, **counts, "tokens": tokens, "tokens per step": round(tokens / steps, 3)},
            **{"drafted": drafted, "accepted": accepted, "seconds": round(time.perf_counter() - began, 1)},
        }

    def step_ms(self, schema: Any, streams: int, tokens: int, spare: int = 1000) -> float:
        """Milliseconds of a step of so many streams, until one has so many tokens, with ``spare`` more allowed."""
        prompts = [self.prompt(f"Write a long list. {number}") for number in range(streams)]
        params = self.params(schema, max_tokens=tokens + spare, temperature=0.0)
        done = [self.engine.submit(prompt, params, speculation=OFF) for prompt in prompts]
        while not all(answer.tokens for answer in done):
            self.engine.step()
        times = []
        while all(answer.finish_reason is None and len(answer.tokens) < tokens for answer in done):
            began = time.perf_counter()
            self.engine.step()
            times.append((time.perf_counter() - began) * 1000)
        self.engine.engine.scheduler.abort([answer.request_id for answer in done])
        self.engine.finish()
        return statistics.median(times)

    def first_ms(self, prompt: list[int], params: SamplingParams) -> float:
        """Milliseconds until the first token of a request that is alone."""
        began = time.perf_counter()
        done = self.engine.submit(prompt, params)
        while not done.tokens and done.finish_reason is None:
            self.engine.step()
        found = (time.perf_counter() - began) * 1000
        self.engine.finish()
        return found


def verdict(schema: Any, text: str, answer: Completion) -> str:
    if answer.finish_reason == "error":
        return "refused"
    if answer.finish_reason != "stop":
        print("cut off:", len(text), "characters, at the end:", repr(text[-100:]), flush=True)
        return "cut off"
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        print("wrong:", text[:300], str(error)[:300], json.dumps(schema)[:300])
        return "wrong"
    return "valid"


def pairs(bench: Bench, asked: list[tuple[str, dict[str, Any]]]) -> Iterator[float]:
    for text, schema in asked:
        prompt, params = bench.prompt(text), bench.params({**schema, "title": text}, max_tokens=2, temperature=0.0)
        plain = bench.params(None, max_tokens=2, temperature=0.0)
        bench.first_ms(prompt, plain)  # the prompt is cached from now on
        unseen = bench.first_ms(prompt, params)
        yield unseen - bench.first_ms(prompt, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", type=Path, help="folder with BFCL_v4_….json")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.data is None:
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None or spec.origin is None:
            parser.error("the package bfcl-eval is not installed: pip install --no-deps bfcl-eval, or --data FOLDER")
        options.data = Path(spec.origin).parent / "data"
    asked = functions(options.data, options.schemas)
    bench = Bench(options)

    items = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}
    bench.step_ms(items, 8, 20)
    ratios, near, plain, constrained = [], [], [], []
    for _ in range(options.rounds):
        plain.append(bench.step_ms(None, 8, 60))
        constrained.append(bench.step_ms(items, 8, 60))
        ratios.append(constrained[-1] / plain[-1])
        near.append(bench.step_ms(items, 8, 60, 0) / plain[-1])
    costs = {"streams": 8, "plain ms": round(statistics.median(plain), 2), "rounds": options.rounds}
    costs |= {"constrained ms": round(statistics.median(constrained), 2), "ratio": round(statistics.median(ratios), 3)}
    costs |= {"near max_tokens, ratio": round(statistics.median(near), 3)}
    print(json.dumps({"step": costs}), flush=True)

    late = sorted(pairs(bench, asked[:40]))
    first = {"schemas": len(late), "median ms": round(statistics.median(late), 2), "worst ms": round(late[-1], 2)}
    print(json.dumps({"first token of an unseen schema, later by": first}), flush=True)

    for temperature in (0.0, 1.0):
        print(json.dumps({"answers": bench.valid(asked, options.max_tokens, temperature)}), flush=True)
    bench.engine.close()


if __name__ == "__main__":
    main()
