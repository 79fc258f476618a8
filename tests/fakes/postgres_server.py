"""A PostgreSQL of the test's own, from what Debian installs: on a socket in a folder, then gone."""

from __future__ import annotations

import os
import pwd
import shutil
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


@contextmanager
def running(programs: Path) -> Iterator[str]:
    """Start one and give its URL."""
    folder = Path(tempfile.mkdtemp(prefix="doherty-postgres-"))
    # It refuses to run as root.
    user = pwd.getpwnam("nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name)
    who = {"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}
    try:
        os.chown(folder, user.pw_uid, user.pw_gid)
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "doherty", "-N", *_CLUSTER],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **who,
        )
        settings = [word for setting in _SETTINGS for word in ("-c", setting)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", folder / "data", "-k", folder, *settings],
                stderr=log,
                cwd=folder,
                **who,
            )
        try:
            _wait(programs, folder, server)
            yield f"postgresql://doherty@/postgres?host={folder}"
        finally:
            server.send_signal(2)  # SIGINT: end now, but in order
            server.wait(_START_S_MAX)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(programs: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_S_MAX
    while subprocess.run([programs / "pg_isready", "-q", "-h", folder], check=False).returncode:
        log = (folder / "log").read_text()
        assert server.poll() is None, log
        assert time.monotonic() < until_s, log
        time.sleep(0.02)
