"""Builds the images and runs what proves them: ``make images``.

What was proved is not proved again while nothing has changed that it rests on: the files that go into the images, the
files in docker/, and the tests; ``--again`` does so all the same. Exit status 3 says that nothing can be proved on this
machine, with the reason; ``--if-possible`` makes that no failure, for a machine without root and without Docker.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "images"))

from engine_here import WORK, UnavailableError, engine  # noqa: E402

SOURCES = (
    *("clients", "docker", "drafter", "engine", "kernels", "loadtest", "server", "tests/images", "scripts"),
    *("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py", ".dockerignore"),
)
NOT_HERE = 3
"""Exit status where no container engine can be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the images and runs what proves them.")
    parser.add_argument("--again", action="store_true", help="Also if nothing has changed since it was proved.")
    parser.add_argument("--slow", action="store_true", help="Also what takes minutes: faults that are to be found.")
    parser.add_argument("--if-possible", action="store_true", help="It is no failure if this machine has no engine.")
    parser.add_argument("--work", type=Path, default=WORK, help="Where to keep what the next run needs.")
    options = parser.parse_args()

    key, proved = fingerprint(), options.work / "proved"
    if proved.exists() and proved.read_text().split("\n")[0] == key and not (options.again or options.slow):
        print(f"Nothing has changed since the images were proved, {proved.read_text().splitlines()[1]}.")
        print("make images ARGS=--again proves them again.")
        return 0
    began = time.monotonic()
    try:
        with engine(options.work) as docker:
            environment = docker.handed_on | {"SLIPSTREAM_IMAGES_WORK": str(options.work)}
            status = run_tests("images" if options.slow else "images and not slow", environment)
    except UnavailableError as error:
        print(f"NOT PROVED: {error}.", file=sys.stderr)
        return 0 if options.if_possible else NOT_HERE
    if status == 0:
        proved.write_text(f"{key}\non {time.strftime('%Y-%m-%d at %H:%M')}, in {time.monotonic() - began:.0f} s")
    return status


def run_tests(which: str, environment: dict[str, str]) -> int:
    """Files side by side: much of what they do is waiting."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "images"), "-m", which, "-rA", "--color=yes"]
    command += ["-n", "3", "--dist", "loadfile", "--durations=12"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def fingerprint() -> str:
    """Of everything that the proof rests on, committed or not."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    found = hashlib.sha256()
    for name in sorted(set(filter(None, names))):
        file = ROOT / name.decode()
        if file.is_file():
            found.update(name + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
