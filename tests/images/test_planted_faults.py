"""What the proof is worth: with a fault in the tree it fails, and says where."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_here import Docker

pytestmark = [pytest.mark.images, pytest.mark.slow]
FOLDER = Path(__file__).parent
Plant = Callable[[Path], None]


def replace(file: str, old: str, new: str) -> Plant:
    def plant(tree: Path) -> None:
        text = (tree / file).read_text()
        assert old in text, f"{file} has no {old!r} any more"
        (tree / file).write_text(text.replace(old, new))

    return plant


FAULTS: dict[str, tuple[Plant, str, str]] = {
    "wrong command": (
        replace("docker/Dockerfile.cpu", 'CMD ["serve"]', 'CMD ["server"]'),
        "test_stack.py::test_the_stack_comes_up_hardened",
        "No such command 'server'",
    ),
    "no compiler, so no kernels": (
        replace("docker/Dockerfile.cpu", "ccache g++", "ccache"),
        "test_build.py::test_the_native_kernels_and_the_default_model_are_in_it",
        "the wheel has no native kernels",
    ),
    "a metric by another name": (
        replace("server/telemetry/metrics.py", '"kv_cache_usage_perc"', '"kv_cache_usage_percent"'),
        "test_stack.py::test_every_query_finds_data",
        "kv_cache_usage_perc",
    ),
    "root": (
        replace("docker/Dockerfile", "USER 10001:0", "USER 0:0"),
        "test_build.py::test_it_is_run_as_a_user_who_is_not_root",
        "10001:0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(docker: Docker, work: Path, tree: Path, tmp_path: Path, fault: str) -> None:
    plant, test, said = FAULTS[fault]
    copy = tmp_path / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, names)):
        if (tree / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, copy / name)
    plant(copy)
    environment = docker.handed_on | {"SLIPSTREAM_IMAGES_TREE": str(copy), "SLIPSTREAM_IMAGES_WORK": str(work)}
    environment |= {"SLIPSTREAM_IMAGES_SUFFIX": "-with-a-fault"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "images", str(FOLDER / test)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout, done.stdout
