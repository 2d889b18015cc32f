"""Train a small policy by GRPO with TRL on a CPU; a Slipstream server samples for it, with the weights of every step.

    python train_with_trl.py MODEL_FOLDER [--steps 30] [--quantize q8] [--kv-cache-dtype fp8] [--report report.json]

Runs in an environment with trl, reasoning-gym and this project; vLLM need not be there. MODEL_FOLDER is a model in
Hugging Face form, for example one made by gguf_to_hf.py with --dtype float32. The server is started with float32
weights, so that log-probabilities can be compared: TRL measures how far its own are from those of the server, token by
token. Each step, what the server told of its samples is held against its own scores of them. Last, the weights that
serve are compared by their checksums with the trainer's, or, where the server packs them, with those of a server that
starts with what the trainer saved. See docs/trainers/trl.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.clients.adapters.trl import connect

START_S = 300.0
MOST_DIFFERENCE = {"exact": 1e-3, "8 bits": 0.2, "q4": 1.0}
"""By what the server keeps: mean of |trainer - server| over log-probabilities of the sampled tokens of a step."""
MOST_OWN_DIFFERENCE = 1e-3
"""Of any token, |told when it was sampled - scored as part of a prompt|, both by the server."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def ask(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


@contextmanager
def server(model: Path, log: Path, *given: str) -> Iterator[str]:
    """Its address, when it is ready. ``given`` are further options."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-P", "-m", "slipstream.server", "serve", "--model", str(model), "--port", str(port)]
    options = ["--dtype", "float32", "--logprobs-mode", "processed", "--kv-cache-memory", "128MiB", *given]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            try:
                ask(url, "/ready")
            except OSError:
                time.sleep(0.5)
            else:
                break
        yield url
    finally:
        process.terminate()
        process.wait(60)


def tasks(size: int, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Sums of two digits of reasoning-gym, and what scores answers."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    rows = [{"prompt": [{"role": "user", "content": entry["question"]}], "entry": json.dumps(entry)} for entry in data]
    return data, rows


def last_number(text: str) -> str:
    """What an answer comes to: its last whole number. A model so small rarely says a number alone."""
    numbers: list[str] = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else text.strip()


def train(url: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    connect()
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    scorer, rows = tasks(arguments.steps * arguments.prompts, arguments.seed)

    def reward(completions: list[Any], entry: list[str], **_: Any) -> list[float]:
        said = [completion[0]["content"] for completion in completions]
        if arguments.reward == "letters":
            return [text.count("e") / max(len(text), 1) for text in said]
        return [scorer.score_answer(last_number(text), json.loads(one)) for text, one in zip(said, entry, strict=True)]

    config = GRPOConfig(
        output_dir=str(folder),
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_group_port=free_port(),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=arguments.prompts * arguments.samples,
        num_generations=arguments.samples,
        max_completion_length=arguments.tokens,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="constant",
        temperature=1.0,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        report_to=[],
        seed=arguments.seed,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=str(arguments.model), reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows)
    )
    own: list[float] = []
    watch(trainer, url, own)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    before = ask(url, "/weight_info")["weight_version"]
    trainer.vllm_generation.sync_weights()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "updates": int(ask(url, "/weight_info")["weight_version"]),
        "updates_of_steps": int(before),
        "rewards": [round(entry["reward"], 4) for entry in steps],
        "logp_differences": [entry["sampling/sampling_logp_difference/mean"] for entry in steps],
        "own_differences": own,
        "gradients": [float(entry["grad_norm"]) for entry in steps],
        "weights_differ": differing(url, trainer, arguments, folder),
    }


def watch(trainer: Any, url: str, own: list[float]) -> None:
    """Adds to ``own``, each time that the trainer has sampled: the largest difference between a log-probability that
    was told of a sample, and what the server says of the same token where it is part of a prompt.
    """
    sampling = trainer.vllm_generation.generate

    def generate(prompts: list[list[int]], *arguments: Any, **named: Any) -> Any:
        found = sampling(prompts, *arguments, **named)
        worst = 0.0
        for prompt, tokens, told in zip(prompts, found[1], found[2], strict=True):
            body = {"input_ids": prompt + tokens, "sampling_params": {"max_new_tokens": 0}}
            body |= {"return_logprob": True, "logprob_start_len": len(prompt)}
            scored = [entry[0] for entry in ask(url, "/generate", body)["meta_info"]["input_token_logprobs"]]
            worst = max(worst, *(abs(one[0] - other) for one, other in zip(told, scored, strict=True)))
        own.append(worst)
        return found

    trainer.vllm_generation.generate = generate


def differing(url: str, trainer: Any, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The parameters whose checksums at the server are not those of what the trainer has."""
    served = checksums(url)
    if arguments.quantize == "none":
        expected = {
            name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in trainer.model.named_parameters()
        }
    else:
        trainer.save_model(str(folder / "trained"))
        with server(folder / "trained", folder / "fresh.log", *formats(arguments)) as fresh:
            expected = checksums(fresh)
    return [name for name, checksum in expected.items() if served.get(name) != checksum]


def checksums(url: str) -> dict[str, str]:
    found: dict[str, str] = ask(url, "/weight_checker", {"action": "checksum"})["checksums"]
    return found


def formats(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The server's options of what it keeps weights, keys and values in."""
    return "--quantize", arguments.quantize, "--kv-cache-dtype", arguments.kv_cache_dtype


def kept(arguments: argparse.Namespace) -> str:
    if arguments.quantize == "q4":
        return "q4"
    return "exact" if (arguments.quantize, arguments.kv_cache_dtype) == ("none", "auto") else "8 bits"


def judge(report: dict[str, Any], most: float) -> list[str]:
    """What is not as it should be. ``most``: see MOST_DIFFERENCE."""
    wrong = []
    if report["updates_of_steps"] < report["steps"]:
        wrong.append(f"{report['updates_of_steps']} updates for {report['steps']} steps")
    if report["weights_differ"]:
        wrong.append(f"other weights serve than were sent: {report['weights_differ'][:3]}")
    if (worst := max(report["logp_differences"])) >= most:
        wrong.append(f"log-probabilities differ by {worst:.2e} in the mean")
    if len(report["own_differences"]) < report["steps"]:
        wrong.append(f"of {report['steps']} steps, {len(report['own_differences'])} were scored by the server")
    elif (worst := max(report["own_differences"])) >= MOST_OWN_DIFFERENCE:
        wrong.append(
            f"the server told log-probabilities of its samples that are off by {worst:.2e} from its own scores"
        )
    third = max(len(report["rewards"]) // 3, 1)
    first, last = (sum(part) / len(part) for part in (report["rewards"][:third], report["rewards"][-third:]))
    report["reward_first_third"], report["reward_last_third"] = round(first, 4), round(last, 4)
    if report["steps"] >= 30 and last <= first:
        wrong.append(f"the reward does not rise: {first:.3f}, then {last:.3f}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="per step")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    letters = "letters: the share of e, for policies that cannot add"
    parser.add_argument("--reward", choices=("sums", "letters"), default="sums", help=letters)
    parser.add_argument("--quantize", choices=("none", "q8", "q4"), default="none", help="the server's")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "int8", "fp8"), default="auto", help="the server's")
    parser.add_argument("--report", type=Path, default=Path("report.json"))
    parser.add_argument("--folder", type=Path, default=Path("trl-output"), help="for the server's log")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with server(arguments.model, arguments.folder / "server.log", *formats(arguments)) as url:
        report = train(url, arguments, arguments.folder)
    wrong = judge(report, MOST_DIFFERENCE[kept(arguments)])
    arguments.report.write_text(json.dumps(report | {"wrong": wrong}, indent=1))
    print(json.dumps(report))
    for text in wrong:
        print(f"error: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
