"""A PostgreSQL of the test's own, from what Debian installs: on a socket in a folder, then gone."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_S_MAX = 30.0
_CLUSTER = ("-A", "trust", "-E", "UTF8", "--locale=C")
# Its folder is thrown away: nothing need survive the loss of power.
_SETTINGS = ("fsync=off", "listen_addresses=", "max_connections=60", "shared_buffers=32MB")


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, the newest there is."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in folders), key=lambda p: int(p.parent.name), default=None)


class Server:
    """One in a folder of its own; to be started again after it was killed."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.url = f"postgresql://doherty@/postgres?host={folder}"
        self._programs, self._folder = programs, folder
        # It refuses to run as root.
        root = os.geteuid() == 0
        user = pwd.getpwnam("nobody") if root else pwd.getpwuid(os.geteuid())
        self._who = {"user": user.pw_uid, "group": user.pw_gid} if root else {}
        os.chown(folder, user.pw_uid, user.pw_gid)
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "doherty", "-N", *_CLUSTER],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **self._who,
        )
        self.start()

    def start(self) -> None:
        own = (*_SETTINGS, f"unix_socket_directories={self._folder}")
        settings = [word for setting in own for word in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", *settings],
                stderr=log,
                cwd=self._folder,
                **self._who,
            )
        until_s = time.monotonic() + _START_S_MAX
        ready = [self._programs / "pg_isready", "-q", "-h", self._folder]
        while subprocess.run(ready, check=False).returncode:
            said = (self._folder / "log").read_text()
            assert self._process.poll() is None, said
            assert time.monotonic() < until_s, said
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: in order. SIGQUIT: at once, so that the next start has to recover."""
        self._process.send_signal(how)
        self._process.wait(_START_S_MAX)


@contextmanager
def running(programs: Path) -> Iterator[Server]:
    """Start one; in the end it is gone with all it kept."""
    folder = Path(tempfile.mkdtemp(prefix="doherty-postgres-"))
    try:
        server = Server(programs, folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
