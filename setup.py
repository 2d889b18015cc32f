"""Maps the top-level folders to the ``slipstream`` namespace and compiles the native CPU kernels.

The kernels are plain C++ behind a C interface, one translation unit per instruction set, linked into one
shared library that is loaded with ctypes. Without a working compiler the install succeeds all the same and
the torch reference kernels are used.
"""

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOTS = ("server", "engine", "kernels", "drafter", "clients", "loadtest")
GLOBS = [glob for root in ROOTS for glob in (root, f"{root}.*")]
CSRC = Path("kernels/csrc")
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
AVX512BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
ISA_FLAGS = {
    "x86_64": {
        "isa_avx2.cpp": AVX2,
        "isa_avx2vnni.cpp": [*AVX2, "-mavxvnni"],
        "isa_avx512.cpp": AVX512,
        "isa_avx512vnni.cpp": [*AVX512, "-mavx512vnni"],
        "isa_avx512bf16.cpp": AVX512BF16,
        "isa_avx512amx.cpp": [*AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    },
    "aarch64": {
        "isa_neon.cpp": [],
        "isa_neondot.cpp": ["-march=armv8.2-a+dotprod"],
        "isa_neonbf16.cpp": ["-march=armv8.2-a+dotprod+bf16"],
    },
}
"""Instruction sets of each architecture; their sources are not for the others.

They are linked in this order: what the standard library's templates are compiled to is taken from the first object
that has it, and every processor must run that.
"""
NEWEST = ("isa_avx2vnni.cpp", "isa_avx512amx.cpp")
"""Left out where compiler or assembler do not know the instructions: the assembler of RHEL 9, for example."""


def architecture() -> str:
    """What is compiled for: of the wheel's platform, if the environment names one as cross-compilers need."""
    machine = os.environ.get("_PYTHON_HOST_PLATFORM", sysconfig.get_platform()).rsplit("-", 1)[-1].lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def compiled(architecture: str) -> dict[Path, list[str]]:
    """Sources for an architecture, in the order in which they are linked, and how each is compiled."""
    sets = ISA_FLAGS.get(architecture, {})
    common = [path for path in sorted(CSRC.glob("*.cpp")) if not path.name.startswith("isa_")]
    return {path: COMMON_FLAGS + sets.get(path.name, []) for path in (*common, *(CSRC / name for name in sets))}


class BuildNative(build_ext):
    """Compiles each source with the flags of its instruction set; the result has a name without ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        def objects_of(source: Path, flags: list[str]) -> list[str]:
            try:
                return self.compiler.compile(
                    [str(source)], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
                )
            except CompileError:
                if source.name not in NEWEST:
                    raise
                self.warn(f"{source} is left out: the compiler, or its assembler, does not know the instructions")
                return []

        # Each instruction set is a minute of compiling: on all processors at once.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [
                each
                for some in pool.map(objects_of, *zip(*compiled(architecture()).items(), strict=True))
                for each in some
            ]
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, output, extra_postargs=["-pthread"], target_lang="c++")


class BuildPython(build_py):
    """Leaves beside server/version.py which commit was built, if that can be found out."""

    def run(self) -> None:
        super().run()
        commit = os.environ.get("SLIPSTREAM_COMMIT") or checked_out()
        if commit not in ("", "unknown") and not self.editable_mode:
            file = Path(self.build_lib, "slipstream/server/commit.txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{commit}\n")


def checked_out() -> str:
    if not Path(".git").exists():
        return ""
    try:
        asked = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


class WheelOfAnyPython(bdist_wheel):
    """The kernels are loaded with ctypes and know nothing of Python: a wheel is for a platform and every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # scripts ask for the flags
    setup(
        packages=[f"slipstream.{package}" for package in find_packages(include=GLOBS)],
        package_dir={f"slipstream.{root}": root for root in ROOTS},
        ext_modules=[
            Extension(
                "slipstream.kernels._native",
                sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
                depends=sorted(str(path) for path in CSRC.glob("*.h")),
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": WheelOfAnyPython},
    )
