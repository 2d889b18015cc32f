"""Builds wheels that need no compiler where they are installed: for this machine's architecture, and for 64-bit ARM by a cross-compiler.

    python scripts/build_wheels.py [--architectures x86_64,aarch64] [--folder dist]

The compiled kernels know nothing of Python, so that a wheel is for every version of it. Its tag says the oldest C library that
it runs with, which is found in the symbols that the kernels ask for: that of the machine it was built on, or an older one. To
support older systems build it in an image made for that: pyproject.toml has the settings for cibuildwheel.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CROSS = {"aarch64": "aarch64-linux-gnu-"}
"""Prefixes of cross-compilers, as Debian names them (package g++-aarch64-linux-gnu)."""
STATIC = "-static-libstdc++ -static-libgcc"
"""What comes with a compiler is not asked of the machine where the wheel is installed."""
LIBRARY = "slipstream/kernels/_native.so"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="x86_64,aarch64")
    parser.add_argument("--folder", type=Path, default=Path("dist"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for architecture in options.architectures.split(","):
        print(build(architecture, options.folder.absolute()))


def build(architecture: str, folder: Path) -> Path:
    """A wheel for an architecture, with the kernels in it."""
    prefix = "" if architecture == os.uname().machine else CROSS[architecture]
    with tempfile.TemporaryDirectory() as temporary:
        # A copy of the tracked files, so that what was built for this machine is not taken for another one.
        tree, made = Path(temporary) / "tree", Path(temporary) / "made"
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, map(bytes.decode, tracked.split(b"\0"))):
            if (ROOT / name).is_file() and not name.startswith((".dev/", "tests/")):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes((ROOT / name).read_bytes())
        compiler = f"{prefix}g++"
        environment = os.environ | {
            "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
            "CC": f"{prefix}gcc",
            "CXX": compiler,
            "LDSHARED": f"{compiler} -shared {STATIC}",
            "LDCXXSHARED": f"{compiler} -shared {STATIC}",
        }
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "wheel",
            "--no-deps",
            "--wheel-dir",
            str(made),
            str(tree),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"no wheel for {architecture}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        [wheel] = made.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            if LIBRARY not in files.namelist():
                sys.exit(f"the wheel for {architecture} has no compiled kernels: is {compiler} installed?")
            files.extract(LIBRARY, temporary)
        least = oldest_library(Path(temporary) / LIBRARY, f"{prefix}objdump")
        name = wheel.name.replace(f"linux_{architecture}", f"manylinux_{least[0]}_{least[1]}_{architecture}")
        return retagged(wheel, folder / name)


def oldest_library(library: Path, objdump: str) -> tuple[int, int]:
    """Version of the oldest glibc that has all symbols that a library asks for."""
    symbols = subprocess.run([objdump, "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return max(((int(a), int(b)) for a, b in re.findall(r"\bGLIBC_(\d+)\.(\d+)", symbols)), default=(2, 17))


def retagged(wheel: Path, target: Path) -> Path:
    """The same wheel with the tag of another name, in its name and in it."""
    old, new = ("-".join(path.stem.split("-")[-3:]) for path in (wheel, target))
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        record: list[str] = []
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith(".dist-info/WHEEL"):
                content = content.replace(f"Tag: {old}".encode(), f"Tag: {new}".encode())
                assert new.encode() in content
                changed = item.filename, content
            if item.filename.endswith(".dist-info/RECORD"):
                record = content.decode().splitlines()
                continue
            made.writestr(item, content)
        made.writestr(next(i for i in source.infolist() if i.filename.endswith("/RECORD")), signed(record, *changed))
    return target


def signed(record: list[str], name: str, content: bytes) -> str:
    """The list of files with the digest of one that was changed."""
    import base64
    import hashlib

    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    lines = [f"{name},sha256={digest},{len(content)}" if line.startswith(f"{name},") else line for line in record]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
