"""The whole demo, in little time: everything happens that happens in a long one."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import xml.etree.ElementTree as ElementTree

import psutil
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["sharegpt", "extract"])
async def test_a_cold_server_learns(tmp_path, workload):
    folder, plot = tmp_path / "demo", tmp_path / "plot.svg"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "slipstream.server", "demo", "--minutes", "3", "--workload", workload),
        *("--folder", str(folder), "--plot", str(plot), "--output-tokens", "48"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"SLIPSTREAM_SPECULATION": "off"},  # the demo has settings of its own
    )
    out, said = await asyncio.wait_for(process.communicate(), 7200)
    assert process.returncode == 0, said.decode() + out.decode() + (folder / "server.log").read_text()
    found = json.loads(out.splitlines()[-1])
    assert found["version"] >= 1
    assert found["swaps"][-1]["version"] == found["version"]
    assert (found["failed"], found["differing_answers"]) == (0, 0)
    assert found["learned_positions"] >= 9000
    assert found["before"]["accept_length"] < found["after"]["accept_length"]
    # A head so young is right so seldom that a few draft tokens at the ends of answers matter.
    assert found["offline_accept_length"] == pytest.approx(found["after"]["accept_length"], rel=0.05)
    assert ElementTree.parse(plot).getroot().get("width")
    assert "live versions" in out.decode()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_server_too(tmp_path, number):
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-P",
            "-m",
            "slipstream.server",
            "demo",
            "--minutes",
            "3",
            "--folder",
            str(tmp_path / "demo"),
        ),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(300):
        while not (server := psutil.Process(process.pid).children()):
            await asyncio.sleep(0.05)
    os.kill(process.pid, number)
    _, said = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode == 128 + number
    assert "Traceback" not in said.decode()
    for child in server:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert child.status() == "zombie"
