"""The stack of `deploy/compose.yaml` on a Docker engine of a test's own, without an image registry.

The engine keeps its images in a cache folder, so that later runs build only what has changed. The
base image is Debian, made by debootstrap from the mirror that this machine's apt uses; pip and apt
in a build are told what this machine's own are told. In Prometheus' place is the program of
Debian's package.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fakes import docker_engine
from tests.fakes.docker_engine import DockerEngine, engine_in
from tests.fakes.programs import ROOT, until

FILE = ROOT / "deploy" / "compose.yaml"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "doherty"
BASE, PROMETHEUS = "doherty-base:bookworm-2", "doherty-prometheus:debian"
_PACKAGES = "python3,python3-venv,ca-certificates"
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def plugin() -> str | None:
    """Return where Docker's Compose plug-in is, if anywhere."""
    named = os.environ.get("DOHERTY_COMPOSE")
    beside = (CACHE / "compose", Path("/usr/libexec/docker/cli-plugins"))
    paths = [Path(named)] if named else [folder / "docker-compose" for folder in beside]
    return next((str(path) for path in paths if os.access(path, os.X_OK)), None)


def reason_why_not() -> str:
    """Say why the stack cannot run here; empty when it can."""
    if reason := docker_engine.reason_why_not():
        return reason
    if plugin() is None:
        return "Docker's Compose plug-in is missing (deploy/compose_plugin.sh FOLDER)"
    for program, package in (("debootstrap", "debootstrap"), ("prometheus", "prometheus")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install {package})"
    return ""


def mirror() -> str:
    """Return the mirror of Debian that this machine's apt uses; empty where it uses none."""
    listed = (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*")))
    for path in listed:
        words = path.read_text().split() if path.is_file() else []
        found = [word for word in words if word.rstrip("/").endswith("/debian")]
        if found and "://" in found[0]:
            return found[0]
    return ""


class Stack:
    """What `docker compose` does with the file, as one project."""

    def __init__(self, engine: DockerEngine, folder: Path, environment: dict[str, str]) -> None:
        self.engine = engine
        plugins = folder / "cli-plugins"
        plugins.mkdir(parents=True)
        (plugins / "docker-compose").symlink_to(plugin() or "")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DOHERTY_", "COMPOSE_"))}
        self.environment = {
            **kept,
            "DOCKER_HOST": engine.url,
            "DOCKER_CONFIG": str(folder),
            "DOCKER_BUILDKIT": "0",  # buildx is absent from Debian
            "COMPOSE_PROJECT_NAME": "doherty-test",
            "DOHERTY_VERSION": "test",
            "DOHERTY_BASE": BASE,
            "DOHERTY_PROMETHEUS_IMAGE": PROMETHEUS,
            "DOHERTY_BUILD_NETWORK": "host",
            "DOHERTY_FILES": "4096",
            "DOHERTY_PROXY_CPUS": "1",
            "DOHERTY_MANAGER_CPUS": "1",
            **environment,
        }

    def compose(self, *words: str, timeout_s: float = 600.0) -> str:
        """Run one command; return its output. The test fails when it does."""
        return self.run("docker", "compose", "--file", str(FILE), *words, timeout_s=timeout_s)

    def run(self, *argv: str, timeout_s: float = 600.0, status: int = 0) -> str:
        done = subprocess.run(
            argv,
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == status, f"{argv} ended with {done.returncode}:\n{output[-4000:]}"
        return output

    def running(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", "--status", "running", service).split()

    def inside(self, service: str, *argv: str) -> str:
        """Run a command in the service's container."""
        return self.engine.docker("exec", self.running(service)[0], *argv)


@contextmanager
def kept_engine() -> Iterator[DockerEngine]:
    """Run the engine whose images are kept, one test run at a time; with the two base images.

    Raises `OSError` where it cannot be had.
    """
    folder = CACHE / "compose-engine"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _end_left_engine(folder)
        with engine_in(folder) as engine:
            for name, make in ((BASE, _import_base), (PROMETHEUS, _import_prometheus)):
                if not engine.docker("images", "--quiet", name):
                    make(engine)
            yield engine
            # What builds have replaced; not today's, or the next one would fetch everything again.
            engine.docker("image", "prune", "--force", "--filter", "until=24h")


def _end_left_engine(folder: Path) -> None:
    """End the engine of a test run that was killed; we have its lock, so it is nobody's."""
    with suppress(OSError, ValueError):
        pid = int((folder / "pid").read_text())
        if str(folder / "data").encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGTERM)
            until(lambda: not Path(f"/proc/{pid}").exists(), "the engine that was left has ended")


def _import_base(engine: DockerEngine) -> None:
    with tempfile.TemporaryDirectory(prefix="doherty-base-") as name:
        root = Path(name)
        made = subprocess.run(
            [
                *("debootstrap", "--variant=minbase", f"--include={_PACKAGES}"),
                *("bookworm", str(root), mirror()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if made.returncode:
            raise OSError(f"debootstrap: {made.stdout.decode(errors='replace')[-500:]}")
        for path in (root / "var/cache/apt/archives").glob("*.deb"):
            path.unlink()
        # apt and pip of a build are told what those of this machine are told.
        (root / _CERTIFICATES).write_bytes(Path("/", _CERTIFICATES).read_bytes())
        for path in (Path("/etc/pip.conf"), *Path("/etc/apt/apt.conf.d").glob("*")):
            if path.is_file() and ("Acquire::" in path.read_text() or path.name == "pip.conf"):
                shutil.copy(path, root / path.relative_to("/"))
        packed = subprocess.run(
            ["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE, check=True
        )
    engine.docker("import", "-", BASE, stdin=packed.stdout)


def _import_prometheus(engine: DockerEngine) -> None:
    """Make an image of this machine's program and of the libraries that it is linked with."""
    program = str(Path(shutil.which("prometheus") or "").resolve())
    linked = subprocess.run(["ldd", program], capture_output=True, check=False).stdout.decode()
    libraries = [word for word in linked.split() if word.startswith("/")]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in (program, *libraries):
            tar.add(Path(path).resolve(), arcname=path)
        for name, owner in (("tmp", 0), ("etc", 0), ("prometheus", 65534)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o755, owner, owner
            tar.addfile(entry)
    entry_point = f'ENTRYPOINT ["{program}"]'
    engine.docker("import", "--change", entry_point, "-", PROMETHEUS, stdin=content.getvalue())
