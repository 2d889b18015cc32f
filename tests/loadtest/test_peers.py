"""Peers are started for real; here the program inside the environment is a small HTTP server of our own."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys

import psutil
import pytest

from slipstream.clients.errors import ClientError
from slipstream.loadtest.peers import PeerOptions, peer
from tests.ports import free_port

# Takes the options of `vllm serve`, starts a helper process as vLLM does, and writes down what it was given.
PROGRAM = """#!{python}
import http.server, json, os, pathlib, signal, subprocess, sys
here = pathlib.Path(sys.argv[0]).parent

def interrupted(*_):
    # KeyboardInterrupt would be lost if it came while Python ends a thread of a request.
    (here / "interrupted").touch()
    os._exit(0)

signal.signal(signal.SIGINT, interrupted)
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
helper = subprocess.Popen([sys.executable, "-c", deaf])
(here / "seen.json").write_text(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "helper": helper.pid}}))
if "--die" in sys.argv:
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def options(tmp_path, port):
    bin_folder = tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(sys.executable)
    program = bin_folder / "vllm"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    model = tmp_path / "model"
    model.mkdir()
    return {"name": "vllm", "model": model, "venv": tmp_path / "venv", "port": port}


def seen(options):
    return json.loads((options["venv"] / "bin" / "seen.json").read_text())


async def gone(pid):
    """A killed process needs a moment, and the processor, to end."""
    async with asyncio.timeout(300):
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != "zombie":
                await asyncio.sleep(0.01)


async def test_a_peer_runs_while_needed_and_leaves_no_process(options, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "5")
    async with peer(PeerOptions(**options, ngram=5, arguments=("--seed", "1"))) as process:
        given = seen(options)
        assert process.returncode is None
        assert psutil.pid_exists(given["helper"])
    assert process.returncode == 0
    assert (options["venv"] / "bin" / "interrupted").exists()
    await gone(given["helper"])
    arguments = given["argv"]
    assert arguments[:2] == ["serve", str(options["model"])]
    assert arguments[arguments.index("--dtype") + 1] == "bfloat16"
    assert arguments[arguments.index("--max-model-len") + 1] == "4096"
    assert '"num_speculative_tokens":5' in arguments[arguments.index("--speculative-config") + 1]
    assert arguments[-2:] == ["--seed", "1"]
    assert given["env"]["HF_HUB_OFFLINE"] == "1"
    assert given["env"]["VLLM_CPU_KVCACHE_SPACE"] == "5"
    assert "PYTHONPATH" not in given["env"]


def test_llama_has_a_whole_context_for_each_slot(options):
    command = PeerOptions(**options | {"name": "llama"}, slots=4, max_model_len=1024).command()
    assert command[command.index("--parallel") + 1] == "4"
    assert command[command.index("--ctx-size") + 1] == "4096"


async def test_a_peer_that_dies_is_told(options):
    with pytest.raises(ClientError, match="status 3 before it was ready"):
        async with peer(PeerOptions(**options, arguments=("--die",))):
            pass


async def test_a_port_in_use_is_told(options, port):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(ClientError, match=f"port {port} is taken"):
            async with peer(PeerOptions(**options)):
                pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_command_ends_cleanly_on_a_signal(options, number):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "slipstream.loadtest", "peer", "vllm", "--model", str(options["model"])),
        *("--venv", str(options["venv"]), "--port", str(options["port"])),
        stderr=asyncio.subprocess.PIPE,
    )
    line = await asyncio.wait_for(process.stderr.readline(), 300)
    assert b"vllm is ready after" in line
    helper = seen(options)["helper"]
    os.kill(process.pid, number)
    assert await asyncio.wait_for(process.wait(), 300) == 0
    process._transport.close()
    await gone(helper)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "tgi"}, "unknown peer"),
        ({"model": "nowhere"}, "no such model"),
        ({"venv": "nowhere"}, "no virtual environment"),
        ({"name": "llama", "ngram": 5}, "vllm only"),
    ],
)
def test_impossible_options_are_refused(options, tmp_path, change, message):
    changed = {key: tmp_path / value if key in ("model", "venv") else value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        PeerOptions(**{**options, **changed})


def test_llama_serves_the_file_with_every_core(options):
    command = PeerOptions(**{**options, "name": "llama"}).command()
    assert command[0] == str(options["venv"] / "bin" / "llama-server") and command[1:3] == [
        "--model",
        str(options["model"]),
    ]
    assert command[command.index("--threads") + 1] == str(len(os.sched_getaffinity(0)))
