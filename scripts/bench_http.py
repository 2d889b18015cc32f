"""CPU time of the API process per token: ``python -P scripts/bench_http.py [--streams 64] [--tokens 200] [--whole]``.

Answers are streamed, or with --whole come at once; ``-- --stream-interval 16`` has them streamed in fewer events.

The engine serves a model of no size, in a process of its own, so what is left is HTTP and text. The API process counts
its CPU time itself (``process_cpu_seconds_total`` of /metrics).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import aiohttp

from slipstream.server.launch import listen
from slipstream.server.testing import write_tiny_model

READY_S = 300


async def read(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name)


async def stream(session: aiohttp.ClientSession, url: str, number: int, tokens: int, whole: bool) -> int:
    """How many bytes came."""
    body = {
        "messages": [{"role": "user", "content": f"Question number {number}"}],
        **{"max_tokens": tokens, "ignore_eos": True, "stream": not whole, "speculation": {"mode": "off"}},
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        received = b""
        size = 0
        async for received in answer.content.iter_any():
            size += len(received)
        assert received.endswith(b"}" if whole else b"[DONE]\n\n")
    return size


async def measure(url: str, streams: int, tokens: int, rounds: int, whole: bool) -> list[dict[str, float]]:
    connector = aiohttp.TCPConnector(limit=0)
    found = []
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    async with session.get(f"{url}/ready") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)
        for number in range(rounds + 1):  # the first one warms up
            before = await read(session, url, "process_cpu_seconds_total")
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(stream(session, url, index, tokens, whole) for index in range(streams)))
            took = asyncio.get_running_loop().time() - began
            spent = await read(session, url, "process_cpu_seconds_total") - before
            if number:
                each = spent / (streams * tokens) * 1e6
                found.append({"us_per_token": round(each, 1), "tokens_per_second": round(streams * tokens / took)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="answers that are not streamed")
    parser.add_argument("options", nargs="*", help="further options of slipstream serve, after --")
    asked = parser.parse_args()
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        command = [
            *(sys.executable, "-P", "-m", "slipstream.server", "serve", "--model", folder, "--port", str(port)),
            *("--kv-cache-memory", "256MiB", "--max-running", str(asked.streams), "--log-level", "warning"),
        ]
        server = subprocess.Popen([*command, *asked.options], stdout=subprocess.DEVNULL)
        try:
            rounds = asyncio.run(
                measure(f"http://127.0.0.1:{port}", asked.streams, asked.tokens, asked.rounds, asked.whole)
            )
        finally:
            server.terminate()
            server.wait(60)
    print(json.dumps({"median_us": statistics.median(each["us_per_token"] for each in rounds), "rounds": rounds}))


if __name__ == "__main__":
    main()
