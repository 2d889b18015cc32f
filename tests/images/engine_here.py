"""A container engine for the proof of the images: the one that runs here, or one of our own where none does.

Our own is Debian's dockerd, unpacked into a folder and installed nowhere, without access to registries. What the
Dockerfiles and the compose file name as base is made here then, under the same name. It is a stand-in: what it cannot
show of the real one is said in docs/deployment.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PACKAGES = (
    *("docker.io", "docker-cli", "docker-buildx", "containerd", "runc"),
    *("iptables", "libxtables12", "libip4tc2", "libip6tc2", "libnftnl11", "libmnl0"),
    *("libnfnetlink0", "libnetfilter-conntrack3"),
)
"""In one release of Debian or another; together they have dockerd, its client and what it needs.

It never touches this machine's firewall, but that inside of each container: there names of services are answered.
"""
WORK = Path("/var/tmp/slipstream-images")
"""Where the engine, its images and the tools are kept between two runs, unless said otherwise."""
PYTHON = "3.11"
"""That of the stand-in, Debian's."""
WHEELS_PORT = 18123
"""Always the same: an address in pip's configuration that changes would empty the build cache."""
STAND_IN = f"python:{PYTHON}-slim-bookworm"


class UnavailableError(Exception):
    """No images can be built on this machine, and why."""


@dataclass(frozen=True)
class Docker:
    """The command line of an engine."""

    binary: str
    environment: Mapping[str, str]
    is_stand_in: bool
    """Base images are made here."""
    build_arguments: tuple[str, ...] = field(default=())

    def __call__(self, *arguments: str, timeout: float = 600, **options: Any) -> str:
        """Standard output; raises RuntimeError with what was said where the command fails."""
        done = self.run(*arguments, timeout=timeout, **options)
        if done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments[:6])} …: {(done.stdout + done.stderr).strip()[-4000:]}")
        return done.stdout.strip()

    def run(self, *arguments: str, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment, **options.pop("environment", {})}
        return subprocess.run(
            [self.binary, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, **options
        )

    @property
    def handed_on(self) -> dict[str, str]:
        """The environment of a process that is to use this engine, too."""
        found = {**os.environ, **self.environment}
        return found | {"SLIPSTREAM_IMAGES_DOCKER": self.binary} if self.is_stand_in else found

    def build(self, file: Path, tag: str, context: Path, *arguments: str) -> None:
        network = ("--network", "host") if self.is_stand_in else ()
        self("build", *network, *self.build_arguments, *arguments, "-f", str(file), "-t", tag, str(context))

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name))[0]


@contextlib.contextmanager
def engine(work: Path, say: Any = print) -> Iterator[Docker]:
    """Gives an engine; ends the one that it started. Raises UnavailableError."""
    if (docker := running_engine(work)) is not None:
        yield docker
        return
    if sys.platform != "linux" or os.geteuid() != 0:
        raise UnavailableError("no Docker engine answers, and starting one here takes root on Linux")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UnavailableError("no Docker engine answers, and the one that could be started here is Debian's")
    work.mkdir(parents=True, exist_ok=True)
    tools = unpack(work, ["mmdebstrap"], "usr/bin/mmdebstrap")
    with ThreadPoolExecutor() as beside:
        archive = beside.submit(make_archive, work, tools)  # takes a minute, and needs no engine
        unpack(work, PACKAGES, "usr/sbin/dockerd")
    with dockerd(work, tools) as docker, wheels(work) as served:
        make_base(docker, work, archive.result(), served)
        yield docker


def running_engine(work: Path) -> Docker | None:
    """The engine that DOCKER_HOST or the system has, if it can build."""
    binary = os.environ.get("SLIPSTREAM_IMAGES_DOCKER") or shutil.which("docker")
    if binary is None:
        return None
    is_stand_in = "SLIPSTREAM_IMAGES_DOCKER" in os.environ  # this process is part of a proof under way
    docker = Docker(binary, {"DOCKER_BUILDKIT": "1"}, is_stand_in, stand_in_arguments() if is_stand_in else ())
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        version = docker.run("version", "--format", "{{.Server.Version}}", timeout=20)
        if version.returncode == 0 and (is_stand_in or docker.run("buildx", "version", timeout=20).returncode == 0):
            return docker
    return None


def stand_in_arguments() -> tuple[str, ...]:
    return ("--build-arg", f"PYTHON_VERSION={PYTHON}", "--build-arg", "TORCH_INDEX=")


def unpack(work: Path, packages: Sequence[str], wanted: str) -> Path:
    """Debian packages in a folder, without installing them; raises UnavailableError if they cannot be had."""
    root = work / "tools"
    if (root / wanted).exists():
        return root
    folder = work / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):
        said = subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True, check=False).stdout.split()
        there = [name for name in packages if name in set(said) and not list(folder.glob(f"{name}_*.deb"))]
        subprocess.run(["apt-get", "download", "-qq", *there], cwd=folder, capture_output=True, check=False)
        if list(folder.glob(f"{packages[0]}_*.deb")) or attempt:
            break
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=False)
    for file in [file for package in packages for file in folder.glob(f"{package}_*.deb")]:
        subprocess.run(["dpkg-deb", "-x", str(file), str(root)], check=True)
    for name in ("iptables", "ip6tables"):  # what an installation would have linked
        if (root / "usr/sbin" / f"{name}-nft").exists() and not (root / "usr/sbin" / name).exists():
            (root / "usr/sbin" / name).symlink_to(f"{name}-nft")
    if not (root / wanted).exists():
        raise UnavailableError(f"{packages[0]} cannot be had from Debian's packages here")
    return root


@contextlib.contextmanager
def dockerd(work: Path, tools: Path) -> Iterator[Docker]:
    """Runs until the block is left; it leaves the firewall and the routes of this machine alone."""
    state, plugins = work / "dockerd", work / "config" / "cli-plugins"
    for folder in (state, plugins):
        folder.mkdir(parents=True, exist_ok=True)
    path = f"{tools}/usr/sbin:{tools}/usr/bin:{os.environ['PATH']}"
    environment = {"PATH": path, "DOCKER_HOST": f"unix://{state}/sock", "DOCKER_BUILDKIT": "1"}
    environment["DOCKER_CONFIG"] = str(work / "config")
    for folder in tools.glob("usr/lib/*-linux-gnu"):
        environment |= {"LD_LIBRARY_PATH": str(folder), "XTABLES_LIBDIR": str(folder / "xtables")}
    link_plugins(plugins, tools)
    end(state / "pid")  # of a proof that was killed
    command = ["dockerd", "--data-root", state / "data", "--exec-root", state / "exec", "--pidfile", state / "pid"]
    command += ["--host", environment["DOCKER_HOST"], "--storage-driver", "overlay2", "--log-level", "error"]
    command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
    command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
    with (state / "log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    docker = Docker(f"{tools}/usr/bin/docker", environment, is_stand_in=True, build_arguments=stand_in_arguments())
    try:
        with contextlib.suppress(TimeoutError):
            until(lambda: docker.run("version").returncode == 0 or process.poll() is not None, 60)
        if process.poll() is not None or docker.run("version").returncode:
            said = (state / "log").read_text(errors="replace").strip().splitlines()
            raise UnavailableError(f"dockerd does not run here: {said[-1] if said else 'it says nothing'}")
        yield docker
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for left in (state / "exec" / "netns").glob("*"):
            subprocess.run(["umount", str(left)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)


def link_plugins(plugins: Path, tools: Path) -> None:
    """Compose, from its package for Python: the wrapper there loses the exit status."""
    import compose

    assert compose.__file__ is not None
    found = {"docker-compose": Path(compose.__file__).parent / "docker-compose"}
    found |= {file.name: file for file in tools.glob("usr/libexec/docker/cli-plugins/*")}
    for name, file in found.items():
        (plugins / name).unlink(missing_ok=True)
        (plugins / name).symlink_to(file)


@contextlib.contextmanager
def wheels(work: Path) -> Iterator[str]:
    """Gives the address of wheels that pip finds on this machine's disk, for builds; empty if there are none."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    folder = Path(os.environ.get("PIP_FIND_LINKS") or said or work / "none")
    if not list(folder.glob("torch-*.whl")):
        yield ""
        return

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{WHEELS_PORT}/"
    finally:
        server.shutdown()
        server.server_close()


def make_archive(work: Path, tools: Path) -> Path:
    """Debian with its Python, as a tar file; raises UnavailableError."""
    archive = work / "base.tar"
    if not archive.exists():
        left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "locale", "info")]
        left_out.append("--dpkgopt=force-unsafe-io")
        command = ["mmdebstrap", "--quiet", "--format=tar", "--variant=minbase", *left_out]
        command += ["--include=python3,python3-venv,ca-certificates"]
        command += ['--customize-hook=cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/ca-certificates.crt"']
        command += ['--customize-hook=cp /etc/apt/apt.conf.d/docker-* "$1/etc/apt/apt.conf.d/" || true']
        command += ['--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin']
        new = archive.with_suffix(".new")
        done = subprocess.run(
            [*command, "bookworm", str(new)],
            env=os.environ | {"PATH": f"{tools}/usr/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UnavailableError(f"no base image can be made here: {done.stderr.strip()[-500:]}")
        new.rename(archive)
    return archive


def make_base(docker: Docker, work: Path, archive: Path, served: str) -> None:
    """The stand-in for the Python image, from the archive; pip is told of this machine's certificates."""
    folder = work / "base"
    if docker.run("image", "inspect", "standin:base").returncode:
        # An import is a new image each time, and would empty the build cache.
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        docker("import", "-c", path, str(archive), "standin:base")
    settings = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt", "timeout = 180"]
    if served:
        settings += [f"find-links = {served}", "trusted-host = 127.0.0.1"]
    folder.mkdir(exist_ok=True)
    (folder / "pip.conf").write_text("\n".join(settings) + "\n")
    (folder / "Dockerfile").write_text("FROM standin:base\nCOPY pip.conf /etc/pip.conf\n")
    docker("build", "-t", STAND_IN, str(folder))


def end(pidfile: Path) -> None:
    """Ends the dockerd of an earlier run, if one still runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        if b"dockerd" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, 15)
            until(lambda: not Path(f"/proc/{pid}").exists(), 30)


def until(happened: Any, seconds: float, pause: float = 0.1) -> Any:
    """What ``happened`` returns once it is true; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {seconds:g} s")
        time.sleep(pause)
    return found
