"""Environments with trainers' own code, from PyPI: made once a session, beside what this one has."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]
INSTALL_S = 3600


@pytest.fixture(scope="session")
def scores() -> Callable[..., list[float]]:
    """Log-probabilities of an answer's tokens by the weights that a server has now."""

    def ask(server: Any, prompt: list[int], tokens: list[int]) -> list[float]:
        body = {"input_ids": prompt + tokens, "sampling_params": {"max_new_tokens": 0}}
        status, answer = server.post("/generate", body | {"return_logprob": True, "logprob_start_len": len(prompt)})
        assert status == 200, answer
        return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]

    return ask


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """What a script says that an interpreter runs."""

    def run_it(python: str, *arguments: str, timeout_s: float = 3600) -> str:
        done = subprocess.run(
            [python, "-P", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout

    return run_it


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Gives the interpreter of an environment with these packages, or skips where they cannot be had.

    SLIPSTREAM_TRAINERS may name a folder in which environments are kept from session to session.
    """
    kept = os.environ.get("SLIPSTREAM_TRAINERS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("trainers")

    def make(name: str, *packages: str, dependencies: bool = True) -> str:
        python = folder / name / "bin" / "python"
        done = folder / name / "done"
        if done.exists() and done.read_text() == " ".join(packages):
            return str(python)
        venv.create(folder / name, with_pip=True, clear=True)
        [site] = (folder / name).glob("lib/python*/site-packages")
        here = [path for path in sys.path if path.endswith("site-packages")]
        # Behind its own packages, so that those of the trainer count where both have them.
        (site / "zz_here.pth").write_text("\n".join([*here, *finders(here)]) + "\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        if not dependencies:
            command.append("--no-deps")
        found = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if found.returncode:
            pytest.skip(f"{' '.join(packages)} cannot be installed here: {found.stderr[-300:]}")
        done.write_text(" ".join(packages))
        return str(python)

    return make


def finders(sites: list[str]) -> list[str]:
    """Lines of .pth files that are no paths, by which a project is found that is installed to be edited."""
    lines = []
    for site in sites:
        for file in Path(site).glob("__editable__*.pth"):
            lines += [line for line in file.read_text().splitlines() if line.startswith("import ")]
    return lines
