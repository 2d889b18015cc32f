"""The proof of the images: `make images`. It takes a container engine, see engine_here.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
from containers import Containers, revision
from engine_here import WORK, Docker, UnavailableError, engine

ROOT = Path(__file__).parents[2]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Only with ``-m images``, as `make images` has it: they need packages that other tests do without."""
    wanted = re.search(r"(?<!not )\bimages\b", config.getoption("markexpr"))
    return None if wanted else True


@pytest.fixture(scope="session")
def tree() -> Path:
    """What is proved: this checkout, or a copy of it with a fault in it."""
    return Path(os.environ.get("SLIPSTREAM_IMAGES_TREE") or ROOT)


@pytest.fixture(scope="session")
def work() -> Path:
    """Where the engine, its images and the tools are kept between two runs."""
    return Path(os.environ.get("SLIPSTREAM_IMAGES_WORK") or WORK)


@pytest.fixture(scope="session")
def docker(work: Path) -> Iterator[Docker]:
    try:
        with engine(work) as found:
            yield found
    except UnavailableError as error:
        pytest.exit(f"NOT PROVED: {error}", returncode=3)


class Images:
    """Both images, each built from the tree when it is first asked for."""

    def __init__(self, docker: Docker, tree: Path) -> None:
        self._docker, self._tree = docker, tree

    @cached_property
    def cpu(self) -> str:
        return self._build("cpu", "Dockerfile.cpu")

    @cached_property
    def cuda(self) -> str:
        return self._build("cuda", "Dockerfile")

    def _build(self, tag: str, file: str) -> str:
        name = f"slipstream:{tag}{os.environ.get('SLIPSTREAM_IMAGES_SUFFIX', '')}"
        labels = ("--build-arg", f"REVISION={revision(self._tree)}")
        self._docker.build(self._tree / "docker" / file, name, self._tree, *labels)
        return name


@pytest.fixture(scope="session")
def images(docker: Docker, tree: Path) -> Images:
    return Images(docker, tree)


@pytest.fixture
def run(docker: Docker, images: Images) -> Iterator[Containers]:
    """Starts containers of the CPU image, and removes them."""
    containers = Containers(docker, images.cpu)
    yield containers
    containers.remove()
