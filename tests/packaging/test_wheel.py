"""The wheel holds what the tree holds, under the name slipstream, and nothing at the top level."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("server", "engine", "kernels", "drafter", "clients", "loadtest")


COMMIT = "0123456789ab"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel that is built from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(bytes.decode, tracked)):
        if (ROOT / name).is_file() and not name.startswith((".dev/", "tests/")):
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    code = (
        "import os, sys; from setuptools import build_meta; "
        "os.chdir(sys.argv[1]); print(build_meta.build_wheel(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "tree"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        # Without a compiler, which would take a minute for what no test here looks at; that is no error.
        env=os.environ | {"CC": "false", "CXX": "false", "SLIPSTREAM_COMMIT": COMMIT},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def contents(wheel: zipfile.ZipFile) -> set[str]:
    return set(wheel.namelist())


def test_it_says_what_it_was_built_of(wheel: zipfile.ZipFile) -> None:
    assert wheel.read("slipstream/server/commit.txt").decode() == f"{COMMIT}\n"


def test_every_module_is_in_it(contents: set[str]) -> None:
    tree = {f"slipstream/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert {name for name in contents if name.endswith(".py")} == tree


def test_only_slipstream_is_at_the_top(contents: set[str]) -> None:
    assert {name.split("/")[0] for name in contents if ".dist-info/" not in name} == {"slipstream"}


def test_data_files_are_in_it(contents: set[str]) -> None:
    assert "slipstream/kernels/py.typed" in contents
    assert "slipstream/kernels/csrc/api.h" in contents
    assert {"slipstream/server/http/chat.html", "slipstream/server/admin/dashboard.html"} <= set(contents)
