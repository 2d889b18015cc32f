"""Maps the top-level folders to the ``slipstream`` namespace and compiles the native CPU kernels.

The kernels are plain C++ behind a C interface, one translation unit per instruction set, linked into one
shared library that is loaded with ctypes. Without a working compiler the install succeeds all the same and
the torch reference kernels are used.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOTS = ("server", "engine", "kernels", "drafter", "clients", "loadtest")
GLOBS = [glob for root in ROOTS for glob in (root, f"{root}.*")]
CSRC = Path("kernels/csrc")
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
ISA_FLAGS = {
    "isa_avx512bf16.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildNative(build_ext):
    """Compiles each source with the flags of its instruction set; the result has a name without ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for source in ext.sources:
            flags = COMMON_FLAGS + ISA_FLAGS.get(Path(source).name, [])
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, output, extra_postargs=["-pthread"], target_lang="c++")


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
    cmdclass={"build_ext": BuildNative},
)
