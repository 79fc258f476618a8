"""A Docker engine of a test's own, and what its containers are made of.

It has its own folders and socket, no bridge and no firewall rules, so that it does nothing to the
machine and nothing to another engine there. Its one image holds empty folders: a container gets
this machine's system, this Python and this checkout as mounts, read-only.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.programs import ROOT, until

IMAGE = "doherty-test:v1.2.3"
_FOLDERS = ("dev", "etc", "proc", "sys", "tmp", "root", "var")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/passwd", "/etc/hosts")


def reason_why_not() -> str:
    """Say why no Docker engine can run here; empty when one can."""
    if shutil.which("dockerd") is None:
        return "dockerd is not installed (Debian: apt-get install docker.io)"
    return "" if os.geteuid() == 0 else "a Docker engine can be started by root only"


class DockerEngine:
    """One `dockerd`, and the client's commands against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Raises `OSError` when it does not come up."""
        with (self.folder / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("dockerd", "--data-root", str(self.folder / "data")),
                    *("--exec-root", str(self.folder / "exec"), "-H", self.url),
                    *("--pidfile", str(self.folder / "pid"), "--bridge=none", "--iptables=false"),
                    "--live-restore",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        process = self.process

        def answers() -> bool:
            if process.poll() is not None:
                raise OSError(f"dockerd ended with status {process.returncode}")
            return self._run("version").returncode == 0

        until(answers, "the Docker engine answers")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)
            self.process = None

    def clean(self) -> None:
        """Leave no container, and no mount of its folders."""
        for name in self.names():
            self.docker("rm", "--force", name)

    def docker(self, *words: str, stdin: bytes | None = None) -> str:
        run = self._run(*words, stdin=stdin)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode().strip()

    def names(self) -> list[str]:
        return self.docker("ps", "--all", "--format", "{{.Names}}").split()

    def inspect(self, name: str) -> dict[str, Any]:
        told: list[dict[str, Any]] = json.loads(self.docker("inspect", name))
        return told[0]

    def import_image(self) -> None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for name in _FOLDERS:
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
                tar.addfile(entry)
        self.docker("import", "-", IMAGE, stdin=content.getvalue())

    def _run(self, *words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        argv = ["docker", "-H", self.url, *words]
        return subprocess.run(argv, input=stdin, capture_output=True, check=False)


def mounts() -> list[str]:
    """Return what a container needs to run this checkout by this Python."""
    python = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    system = [path for path in _SYSTEM if Path(path).exists()]
    beside = [path for path in (*sorted(python), str(ROOT)) if not path.startswith("/usr/")]
    return [f"{path}:ro" for path in (*system, *beside)]


@contextmanager
def docker_engine() -> Iterator[DockerEngine]:
    """Run an engine as long as the block. Raises `OSError` where it does not come up.

    Not in a folder of pytest's, which removes those of earlier runs whatever is mounted there.
    """
    folder = Path(tempfile.mkdtemp(prefix="doherty-docker-"))
    try:
        with engine_in(folder) as engine:
            engine.import_image()
            yield engine
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def engine_in(folder: Path) -> Iterator[DockerEngine]:
    """Run an engine in `folder`, which stays, with the images of the last one there.

    Raises `OSError` where it does not come up.
    """
    engine = DockerEngine(folder)
    try:
        engine.start()
        yield engine
    finally:
        if engine.process is not None:
            engine.clean()
            engine.stop()
        for point in _mounted_under(engine.folder):
            subprocess.run(["umount", "--lazy", point], check=True)


def _mounted_under(folder: Path) -> list[str]:
    """Return what is mounted below `folder`, the innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((p for p in points if p.startswith(f"{folder}/")), reverse=True)
