import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from slipstream.loadtest.processes import ProcessTree, serving

# Holds 40 MiB in a grandchild and burns half a second of processor time there.
SPAWNER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import time
ballast = bytearray(b"x") * (40 * 1024 * 1024)
end = time.process_time() + 0.5
while time.process_time() < end: pass
print("done", flush=True)
time.sleep(600)
'''], stdout=subprocess.PIPE)
child.stdout.readline()
print("done", flush=True)
time.sleep(600)
"""


def test_a_tree_includes_its_descendants():
    with subprocess.Popen([sys.executable, "-c", SPAWNER], stdout=subprocess.PIPE) as process:
        tree = ProcessTree(process.pid)
        processes = []
        try:
            process.stdout.readline()
            processes = list(tree.processes())
            assert len(processes) == 2
            assert tree.cpu_seconds() > 0.5
            parent, child = (tree.resident_bytes()[f"{each.name()} {each.pid}"] for each in processes)
            assert child > 40 * 1024 * 1024 > parent
            before = tree.cpu_seconds()
            time.sleep(0.2)
            assert tree.cpu_seconds() - before < 0.05
        finally:
            for each in processes:
                each.kill()
            process.kill()
    assert tree.cpu_seconds() == 0
    assert tree.resident_bytes() == {}


def test_a_frozen_tree_stands_still():
    with subprocess.Popen([sys.executable, "-c", SPAWNER], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        tree = ProcessTree(process.pid)
        processes = list(tree.processes())
        with tree.frozen():
            processes[1].kill()  # one that ends meanwhile is nothing to worry about
            assert processes[0].status() == psutil.STATUS_STOPPED
        assert processes[0].status() != psutil.STATUS_STOPPED
        process.kill()


def test_the_process_behind_a_local_port_is_found():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert serving(f"http://127.0.0.1:{port}") == ProcessTree(os.getpid())
        assert serving(f"http://example.com:{port}") is None
    assert serving(f"http://127.0.0.1:{port}") is None


def test_an_unknown_process_is_refused():
    with pytest.raises(ValueError, match="no process"):
        ProcessTree(2**22 + 1)
