"""Proves the compiled kernels on processors that this machine is not: by emulation, and by what was compiled.

    python scripts/prove_kernels.py [--on native,amx,aarch64,instructions] [--install]

Tests of the kernels run here first, and what they have the kernels do is recorded (tests/kernels/replay/). A small
program without anything but the kernels then does the same again, compares the results, and looks that bits depend
neither on the batch nor on the number of threads:

- native: with every variant that this processor runs, which proves the program itself;
- amx: with the variant for Intel's tiles, whose instructions trap here and are done by a program (replay/tiles.cpp);
- aarch64: cross-compiled, under qemu's user-mode emulation of three 64-bit ARM processors, each of which must choose
  a variant of its own;
- avx512, only if asked for, since it has not yet come to an end: booted with a kernel of Linux on Bochs, which emulates
  whole machines, as a Skylake and as an Ice Lake server;
- instructions: what each variant was compiled to is disassembled, for the instructions that it must and must not have.

Takes some minutes. --install first installs what is missing of Debian's packages, which takes root.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPLAY = ROOT / "tests/kernels/replay"
CSRC = ROOT / "kernels/csrc"
RECORDED = (
    "tests/kernels/test_weight.py",
    "tests/kernels/test_attention.py",
    "tests/kernels/test_eight_bits.py",
    "tests/kernels/test_sampling.py",
    "tests/kernels/test_quantised.py",
    "tests/engine/models/test_families.py",
    "tests/engine/speculation/test_every_form.py",
)
"""Tests of whatever calls the compiled kernels; those of whole models call them as the engine does."""
CHOSEN = "not (test_families or triton or gpu) or Llama or Qwen or Mistral"
"""Those families whose layers the compiled kernels run, and all other tests."""
PACKAGES = {
    "aarch64": ("g++-aarch64-linux-gnu", "qemu-user-static"),
    "avx512": ("bochs", "genisoimage", "isolinux", "syslinux-common", "cpio"),
    "instructions": ("binutils", "g++-aarch64-linux-gnu"),
}
"""Debian's packages that a proof needs, besides a compiler; and that of a small kernel, KERNEL."""
KERNEL = "linux-image-cloud-amd64"
ARM_PROCESSORS = {"cortex-a53": "neon", "neoverse-n1": "neondot", "max": "neonbf16"}
"""Processors that qemu emulates, and the variant that must be chosen on each."""
MACHINES = {"corei7_skylake_x": "avx512", "corei7_icelake_u": "avx512vnni"}
"""Processors that Bochs emulates, and the variant that must be chosen on each."""


@dataclass(frozen=True)
class Target:
    architecture: str
    compiler: str


NATIVE = Target(os.uname().machine, os.environ.get("CXX", "g++"))
X86 = Target("x86_64", os.environ.get("CXX", "g++"))
ARM = Target("aarch64", "aarch64-linux-gnu-g++")


class NotProvedError(Exception):
    """What went wrong, for people."""


def flags(target: Target) -> dict[Path, list[str]]:
    """The sources for an architecture, and how setup.py compiles them."""
    os.chdir(ROOT)  # as setup.py expects
    setup: dict[str, Any] = runpy.run_path("setup.py", run_name="flags")
    compiled: dict[Path, list[str]] = setup["compiled"](target.architecture)
    return {ROOT / path: [flag for flag in flags if flag != "-fPIC"] for path, flags in compiled.items()}


def build(target: Target, folder: Path, traps: bool = False) -> Path:
    """The program that replays recordings, in one file that needs nothing else.

    ``traps``: with what does AMX's instructions where the processor has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = ["-std=c++20", "-O2"]
    sources = {**flags(target), REPLAY / "replay.cpp": plain}
    if traps:
        sources[REPLAY / "tiles.cpp"] = plain
        sources[CSRC / "native.cpp"].append("-DSLIP_TRAPPED_TILES")

    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        run([target.compiler, *sources[source], f"-I{CSRC}", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    program = folder / "replay"
    run([target.compiler, "-static", "-pthread", *objects, "-o", str(program)])
    return program


def record(path: Path) -> None:
    """Runs the tests, and writes what they had the kernels do."""
    environment = os.environ | {"SLIPSTREAM_RECORDING": str(path), "PYTHONPATH": str(REPLAY)}
    tests = [name for name in RECORDED if (ROOT / name).exists()]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "recording",
        "-m",
        "not slow and not gpu",
        "-k",
        CHOSEN,
        *tests,
    ]
    run(command, env=environment, cwd=ROOT)
    print(f"recorded {path.stat().st_size / 1e6:.0f} MB of calls")


def run(command: Sequence[str], **options: Any) -> str:
    """The output of a command that succeeds."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise NotProvedError(f"{' '.join(map(str, command[:3]))} …\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def check_shared(objects: Sequence[Path], tool: str) -> None:
    """What several of them have in common, templates of the standard library, must be taken from the first of all."""
    defined: dict[Path, set[str]] = {}
    for path in objects:
        lines = run([tool, "--defined-only", "-C", str(path)]).splitlines()
        defined[path] = {line.split(maxsplit=2)[2] for line in lines if re.match(r"\S+ [WVu] ", line)}
    first = objects[0]
    users = Counter(name for names in defined.values() for name in names)
    for path in objects[1:]:
        space = path.stem.removeprefix("isa_")
        own = f"slip::{space}", f"NS_{len(space)}{space}"  # the tool does not read every name
        shared = (name for name in defined[path] - defined[first] if users[name] > 1)
        if strange := [name for name in shared if not any(map(name.__contains__, own))]:
            raise NotProvedError(
                f"{path.stem} may be used by processors that do not run it: {', '.join(sorted(strange)[:5])}"
            )


def tell(title: str, output: str) -> None:
    lines = [line for line in output.splitlines() if line.strip()]
    print(f"{title}\n" + "\n".join(f"  {line}" for line in lines), flush=True)


def native(folder: Path, recording: Path) -> None:
    tell("on this processor", run([str(build(NATIVE, folder / "native")), str(recording)]))


def amx(folder: Path, recording: Path) -> None:
    """Needs a processor with AVX-512 BF16: what is not tiles is computed as it is."""
    program = build(X86, folder / "amx", traps=True)
    tell("tiles of AMX, trapped and emulated", run([str(program), str(recording), "avx512amx"]))


def aarch64(folder: Path, recording: Path) -> None:
    program = build(ARM, folder / "aarch64")
    for processor, variant in ARM_PROCESSORS.items():
        command = ["qemu-aarch64-static", "-cpu", processor, str(program), str(recording), variant]
        output = run(command)
        if not output.startswith(f"chosen: {variant}\n"):
            raise NotProvedError(f"{processor}: {output.splitlines()[0]}, not {variant}")
        tell(f"64-bit ARM, {processor} emulated by qemu", output)


# Bochs --------------------------------------------------------------------------------------------------------------

INIT = b"""\
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

int main() {
  mount("none", "/dev", "devtmpfs", 0, nullptr);
  mount("none", "/proc", "proc", 0, nullptr);
  std::freopen("/dev/ttyS0", "w", stdout);
  std::freopen("/dev/ttyS0", "w", stderr);
  std::FILE* processor = std::fopen("/proc/cpuinfo", "r");
  for (char line[8192]; processor && std::fgets(line, sizeof line, processor);)
    if (!std::strncmp(line, "flags", 5)) std::printf("%s", line);
  std::printf("BEGIN\\n");
  std::fflush(stdout);
  if (fork() == 0) execl("/replay", "replay", "/recording", VARIANT, nullptr);
  int status = 0;
  wait(&status);
  std::printf("END %d\\n", status);
  std::fflush(stdout);
  sleep(1);
  reboot(RB_POWER_OFF);
}
"""
BOCHSRC = """\
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0
megs: 1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={disk}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
display_library: rfb, options="timeout=0"
speaker: enabled=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
clock: sync=none
"""


def avx512(folder: Path, recording: Path) -> None:
    program = build(X86, folder / "x86_64")
    linux = kernel(folder)
    for model, variant in MACHINES.items():
        began = time.monotonic()
        disk = disk_image(folder / model, linux, program, recording, variant)
        output = boot(folder / model, model, disk)
        tell(f"{model}, emulated by Bochs in {time.monotonic() - began:.0f} s", output)


def kernel(folder: Path) -> Path:
    """A kernel of Linux; its package is unpacked here, not installed."""
    unpacked = folder / "linux"
    if not unpacked.exists():
        depends = run(["apt-cache", "depends", KERNEL])
        name = re.search(r"Depends: (linux-image-\S+)", depends)
        assert name is not None
        packages = folder / "packages"
        packages.mkdir(exist_ok=True)
        run(["apt-get", "download", name[1]], cwd=packages)
        run(["dpkg", "-x", str(next(packages.glob("linux-image-*.deb"))), str(unpacked)])
    return next((unpacked / "boot").glob("vmlinuz-*"))


def disk_image(folder: Path, linux: Path, program: Path, recording: Path, variant: str) -> Path:
    """A CD that boots the kernel, with a file system of three files in memory."""
    root, disc = folder / "root", folder / "disc"
    for each in (root, disc):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir(parents=True)
    for name in ("dev", "proc"):
        (root / name).mkdir()
    source = folder / "init.cpp"
    source.write_bytes(INIT)
    run([X86.compiler, "-O1", "-static", f'-DVARIANT="{variant}"', str(source), "-o", str(root / "init")])
    shutil.copy(program, root / "replay")
    shutil.copy(recording, root / "recording")
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=root, capture_output=True, check=True
    )
    (disc / "initrd").write_bytes(gzip.compress(packed.stdout, 1))
    shutil.copy(linux, disc / "linux")
    shutil.copy("/usr/lib/ISOLINUX/isolinux.bin", disc)
    shutil.copy("/usr/lib/syslinux/modules/bios/ldlinux.c32", disc)
    arguments = "console=ttyS0 quiet noxsaves clearcpuid=321 mitigations=off nokaslr nosmp random.trust_cpu=on panic=-1"
    (disc / "isolinux.cfg").write_text(f"default linux\nlabel linux\nkernel linux\ninitrd initrd\nappend {arguments}\n")
    image = folder / "disk.iso"
    boots = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    run(["genisoimage", "-quiet", "-o", str(image), *boots, str(disc)])
    return image


def boot(folder: Path, model: str, disk: Path) -> str:
    """What the program printed; the machine ends by itself."""
    serial, config = folder / "serial", folder / "bochsrc"
    serial.unlink(missing_ok=True)
    config.write_text(BOCHSRC.format(model=model, disk=disk, serial=serial, log=folder / "log"))
    (folder / "commands").write_text("c\nq\n")  # of its debugger: to begin, and what follows the end
    process = subprocess.Popen(
        ["bochs", "-q", "-f", str(config), "-rc", "commands"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        process.wait(timeout=1500)
    except subprocess.TimeoutExpired:
        process.kill()
        raise NotProvedError(f"{model}: the machine did not come to an end\n{serial.read_text()[-3000:]}") from None
    printed = serial.read_text().replace("\r", "")
    found = re.search(r"^BEGIN\n(.*)^END (\d+)$", printed, re.DOTALL | re.MULTILINE)
    if found is None or found[2] != "0":
        raise NotProvedError(f"{model}: {printed[-3000:]}")
    return found[1]


# Instructions -------------------------------------------------------------------------------------------------------

EXPECTED = {
    "isa_avx2": (("vfmadd231ps .*%ymm",), (r"%zmm", "vdpbf16ps", "vpdpbusd")),
    "isa_avx2vnni": (
        ("vfmadd231ps .*%ymm", r"\{vex\} vpdpbusd .*%ymm"),
        (r"%zmm", r"%[xy]mm(1[6-9]|[23]\d)", r"%k\d", "vdpbf16ps"),
    ),
    "isa_avx512": (
        ("vfmadd231ps .*%zmm", "vpslld .*%zmm"),
        ("vdpbf16ps", "vcvtneps2bf16", "vcvtne2ps2bf16", "vpdpbusd"),
    ),
    "isa_avx512vnni": (
        ("vfmadd231ps .*%zmm", "vpslld .*%zmm", "vpdpbusd .*%zmm"),
        ("vdpbf16ps", "vcvtneps2bf16", "vcvtne2ps2bf16"),
    ),
    "isa_avx512bf16": (("vdpbf16ps .*%zmm", "vcvtneps2bf16 .*%zmm", "vpdpbusd .*%zmm"), ("tdpbf16ps", "tdpbssd")),
    "isa_avx512amx": (
        (
            *("ldtilecfg", "tileloadd", "tilestored", "tilezero", "tilerelease"),
            *("tdpbf16ps", "tdpbssd", "vdpbf16ps .*%zmm", "vpdpbusd .*%zmm"),
        ),
        (),
    ),
    "isa_neon": ((r"fmla\s+v\d+\.4s",), ("bfdot", "bfmmla", "bfcvt", "sdot", "udot", "smmla", "fmla.*8h")),
    "isa_neondot": ((r"fmla\s+v\d+\.4s", r"sdot\s+v\d+\.4s"), ("bfdot", "bfmmla", "bfcvt", "smmla", "fmla.*8h")),
    "isa_neonbf16": ((r"bfdot\s+v\d+\.4s", r"sdot\s+v\d+\.4s", "bfcvtn2"), ("bfmmla", "smmla", "fmla.*8h")),
}
"""By object: instructions that must be there, and that must not, since not every processor of the variant has them."""


def instructions(folder: Path, recording: Path) -> None:
    for target, dump in ((X86, "objdump"), (ARM, "aarch64-linux-gnu-objdump")):
        build(target, folder / target.architecture)
        objects = [folder / target.architecture / f"{path.stem}.o" for path in flags(target) if path.stem in EXPECTED]
        check_shared(objects, dump.replace("objdump", "nm"))
        for path in objects:
            wanted, unwanted = EXPECTED[path.stem]
            code = run([dump, "-d", "--no-show-raw-insn", str(path)])
            counts = {each: len(re.findall(each, code)) for each in (*wanted, *unwanted)}
            if wrong := [each for each in counts if (counts[each] > 0) != (each in wanted)]:
                raise NotProvedError(f"{path.stem}: {', '.join(f'{each} {counts[each]} times' for each in wrong)}")
            tell(path.stem, ", ".join(f"{each} {count} times" for each, count in counts.items()))


PROOFS = {"native": native, "amx": amx, "aarch64": aarch64, "avx512": avx512, "instructions": instructions}


def install(proofs: Sequence[str]) -> None:
    packages = sorted({package for proof in proofs for package in PACKAGES.get(proof, ())})
    if packages:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="native,amx,aarch64,instructions", help="which proofs, by name")
    parser.add_argument("--install", action="store_true", help="install missing packages of Debian")
    parser.add_argument("--folder", type=Path, help="keeps what is made there; what is there already is not made again")
    options = parser.parse_args()
    proofs = options.on.split(",")
    if unknown := set(proofs) - set(PROOFS):
        parser.error(f"--on {','.join(sorted(unknown))}: there are {', '.join(PROOFS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder.absolute() if options.folder else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        recording = folder / "recording"
        try:
            if options.install:
                install(proofs)
            if proofs != ["instructions"] and not recording.exists():
                record(recording)
            for proof in proofs:
                PROOFS[proof](folder, recording)
        except (NotProvedError, FileNotFoundError) as error:
            print(f"NOT PROVED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
