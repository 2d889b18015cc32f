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
SOURCES = (
    *("clients", "docker", "drafter", "engine", "kernels", "loadtest", "server", "tests/images"),
    *("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py", ".dockerignore"),
)
NOT_HERE = 3
"""Exit status where no container engine can be had."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the images and runs what proves them.")
    parser.add_argument("--again", action="store_true", help="Also if nothing has changed since it was proved.")
    parser.add_argument(
        "--faults", action="store_true", help="Also whether faults in the tree are found; takes minutes."
    )
    parser.add_argument("--if-possible", action="store_true", help="It is no failure if this machine has no engine.")
    parser.add_argument(
        "--work", type=Path, default=Path("/var/tmp/slipstream-images"), help="What is kept between runs."
    )
    options = parser.parse_args()

    key, proved = fingerprint(), options.work / "proved"
    if proved.exists() and proved.read_text().split("\n")[0] == key and not (options.again or options.faults):
        print(f"Nothing has changed since the images were proved, {proved.read_text().splitlines()[1]}.")
        print("make images ARGS=--again proves them again.")
        return 0
    began = time.monotonic()
    which = "images" if options.faults else "images and not slow"
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "images"), "-m", which, "--durations=12"]
    status = subprocess.run([*command, "-rA", "--color=yes"], cwd=ROOT, check=False).returncode
    if status == 0:
        options.work.mkdir(parents=True, exist_ok=True)
        proved.write_text(f"{key}\non {time.strftime('%Y-%m-%d at %H:%M')}, in {time.monotonic() - began:.0f} s")
    if status == NOT_HERE and options.if_possible:
        print("The images are NOT proved by this run.")
        return 0
    return status


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
