"""The proof of the images: `make images`. It takes a container engine, see engine_here.py."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from containers import Containers, revision
from engine_here import Docker, UnavailableError, engine

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
    return Path(os.environ.get("SLIPSTREAM_IMAGES_WORK") or "/var/tmp/slipstream-images")


@pytest.fixture(scope="session")
def docker(work: Path) -> Iterator[Docker]:
    try:
        with engine(work) as found:
            yield found
    except UnavailableError as error:
        pytest.exit(f"NOT PROVED: {error}", returncode=3)


@dataclass(frozen=True)
class Images:
    cpu: str
    cuda: str


@pytest.fixture(scope="session")
def images(docker: Docker, tree: Path) -> Images:
    """Both images, built from the tree."""
    suffix = os.environ.get("SLIPSTREAM_IMAGES_SUFFIX", "")
    names = Images(f"slipstream:cpu{suffix}", f"slipstream:cuda{suffix}")
    for name, file in ((names.cpu, "Dockerfile.cpu"), (names.cuda, "Dockerfile")):
        docker.build(tree / "docker" / file, name, tree, "--build-arg", f"REVISION={revision(tree)}")
    return names


@pytest.fixture
def run(docker: Docker, images: Images) -> Iterator[Containers]:
    """Starts containers of the CPU image, and removes them."""
    containers = Containers(docker, images.cpu)
    yield containers
    containers.remove()
