"""The clients that are tried, in pinned versions, and running their scripts: each in an environment of its own.

``python tests/compat/compat_clients.py [NAME …]`` tries them against the default model and writes the table of
docs/clients.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".compat"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- begin of the table of tests/compat -->", "<!-- end of the table of tests/compat -->"
SECONDS = 1800


@dataclass(frozen=True)
class CompatClient:
    name: str
    requirements: tuple[str, ...]
    script: str
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / re.sub(r"\W+", "-", self.name)

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = {
    client.name: client
    for client in (
        CompatClient("openai", ("openai==3.57.0",), "use_openai.py"),
        CompatClient("openai (before 1.0)", ("openai==0.28.1",), "use_openai_old.py"),
        CompatClient("openai (Node.js)", ("openai@6.49.0",), "use_openai_node.mjs"),
        CompatClient("anthropic", ("anthropic==2.14.0",), "use_anthropic.py"),
        CompatClient("anthropic (Node.js)", ("@anthropic-ai/sdk@1.14.0",), "use_anthropic_node.mjs"),
        CompatClient(
            "AI SDK (Node.js)",
            (
                *("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92"),
                *("@ai-sdk/anthropic@3.0.140", "zod@4.6.7"),
            ),
            "use_ai_sdk.mjs",
        ),
        CompatClient("instructor", ("instructor==1.17.0",), "use_instructor.py"),
        CompatClient("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), "use_pydantic_ai.py"),
        CompatClient("openai-agents", ("openai-agents==0.24.0",), "use_openai_agents.py"),
        CompatClient("litellm", ("litellm==1.110.0",), "use_litellm.py"),
        CompatClient("langchain-openai", ("langchain-openai==1.7.4",), "use_langchain.py"),
        CompatClient(
            "langchain (Node.js)", ("@langchain/openai@1.5.8", "@langchain/core@1.4.0"), "use_langchain_node.mjs"
        ),
        CompatClient(
            "llama-index",
            ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0"),
            "use_llama_index.py",
        ),
        CompatClient("llm", ("llm==0.36",), "use_llm.py"),
        CompatClient("lm-eval", ("lm-eval[api]==0.4.13",), "use_lm_eval.py"),
        CompatClient("guidellm", ("guidellm==0.8.1",), "use_guidellm.py"),
        CompatClient("sglang-router", ("sglang-router==0.3.2",), "use_router.py", ("sglang",)),
        CompatClient("vllm-router", ("vllm-router==0.1.17",), "use_router.py", ("vllm",)),
    )
}


def install(client: CompatClient) -> Path:
    """The program that runs its script; installs what is missing."""
    folder = client.folder
    marker = folder / "installed.json"
    program = Path(shutil.which("node") or "node") if client.is_node else folder / "bin" / "python"
    if marker.exists() and json.loads(marker.read_text()) == list(client.requirements):
        return program
    shutil.rmtree(folder, ignore_errors=True)
    if client.is_node:
        folder.mkdir(parents=True)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *client.requirements]
        subprocess.run(npm, check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)
    else:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=SECONDS)
        pip = [str(program), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["-c", str(HERE / "constraints.txt"), *client.requirements]
        subprocess.run(pip, check=True, timeout=SECONDS)
    marker.write_text(json.dumps(list(client.requirements)))
    return program


def try_out(client: CompatClient, url: str, model: str) -> tuple[list[dict[str, Any]], str]:
    """The outcome of each feature, and all that the script printed."""
    program = install(client)
    script = HERE / client.script
    if client.is_node:  # modules are looked for beside the script
        shutil.copy(HERE / "checks.mjs", client.folder)
        script = Path(shutil.copy(script, client.folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OPENAI"))}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(program), str(script), url, model, *client.arguments],
            capture_output=True, text=True, timeout=SECONDS, env=environment | own_servers(Path(folder) / "tiny"),
            cwd=script.parent,
        )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature"')]
    return found, done.stdout + done.stderr


def own_servers(folder: Path) -> dict[str, str]:
    """What lets a script start servers of its own, of a model of no size which is written to a folder."""
    from slipstream.server.testing import write_tiny_model

    folder.mkdir()
    write_tiny_model(folder)
    serve = [sys.executable, "-P", "-m", "slipstream.server", "serve", "--model", str(folder)]
    return {
        "COMPAT_SERVE": shlex.join([*serve, "--kv-cache-memory", "32MiB", "--served-model-name", "tiny"]),
        "COMPAT_SERVED": "tiny",
    }


@contextmanager
def default_server() -> Iterator[tuple[str, str]]:
    """A server of the default model in this process: its URL and the model's name."""
    from slipstream.engine.config import EngineConfig
    from slipstream.server.config import ServerConfig
    from slipstream.server.testing import ServerThread

    with tempfile.TemporaryDirectory() as folder:
        server = ServerThread(ServerConfig(batch_folder=folder), EngineConfig(kv_cache_memory="256MiB")).start()
        try:
            deadline = time.monotonic() + SECONDS
            while server.service.ready()[0] != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield server.url, server.service.model_names[0]
        finally:
            server.stop()


def table(outcomes: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| client | what works |", "|---|---|"]
    for name, found in outcomes.items():
        version = re.split("[=@]+", CLIENTS[name].requirements[0])[-1]
        works = "; ".join(each["feature"] for each in found if each["ok"])
        broken = "; ".join(each["feature"] for each in found if not each["ok"])
        lines.append(f"| {name} {version} | {works or 'nothing'}{f'. **Not:** {broken}' if broken else ''} |")
    return "\n".join(lines)


def write_table(outcomes: dict[str, list[dict[str, Any]]]) -> None:
    """Rows of clients that were not tried stay as they are."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    head, rule, *new = table(outcomes).splitlines()
    rows = {name: line for line in [*old.splitlines(), *new] for name in names_of(line)}
    text = "\n".join([head, rule, *(rows[name] for name in CLIENTS if name in rows)])
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def names_of(line: str) -> list[str]:
    """The client that a row is about."""
    return sorted((name for name in CLIENTS if line.startswith(f"| {name} ")), key=len)[-1:]


def main(names: Sequence[str]) -> int:
    outcomes: dict[str, list[dict[str, Any]]] = {}
    with default_server() as (url, model):
        for name in names or list(CLIENTS):
            try:
                found, printed = try_out(CLIENTS[name], url, model)
            except (subprocess.SubprocessError, OSError) as error:
                found, printed = [], str(error)
            outcomes[name] = found
            write_table({name: found})  # at once: a run of all takes long, and may be ended
            if not found or not all(each["ok"] for each in found):
                print(printed[-6000:])
            print(name, *(f"\n  {'ok ' if each['ok'] else 'NOT'} {each['feature']}" for each in found), flush=True)
    return 0 if all(found and all(each["ok"] for each in found) for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
