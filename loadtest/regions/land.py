"""Places on one machine that only relays join: network namespaces, and packets that can be lost.

Everything lies in a network namespace of its own that ends with this process, so that nothing of
the machine's network is touched. Each place is another within it, with one pair of interfaces to
the outside, where clients and relays are. A way between two places is cut in the kernel, by rules
that drop its packets: nobody is told, as when a cable is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loadtest.run import RunError

INSIDE: Final = "DOHERTY_REGIONS_INSIDE"
PROGRAMS: Final = ("ip", "iptables", "unshare", "nsenter")
NETWORK: Final = "10.77"


def enter(argv: Sequence[str]) -> None:
    """Begin this command anew in a network of its own, unless it is there already."""
    if os.environ.get(INSIDE):
        _shell("ip", "link", "set", "lo", "up")
        return
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise RunError(f"needs {', '.join(missing)} (Debian: iproute2, iptables, util-linux)")
    if os.geteuid() != 0:
        raise RunError("needs root: it makes network namespaces")
    environ = {**os.environ, INSIDE: "1"}
    command = ["unshare", "-n", sys.executable, "-m", "loadtest", *argv]
    os.execvpe(command[0], command, environ)  # noqa: S606 - the user's own command


class Place:
    """One namespace: `address` is its own, `gate` is where relays listen for it."""

    def __init__(self, number: int) -> None:
        self.address = f"{NETWORK}.{number}.2"
        self.gate = f"{NETWORK}.{number}.1"
        self._holder = subprocess.Popen(("unshare", "-n", "sleep", "infinity"))  # noqa: S607 - Debian's
        self._number = number

    async def build(self) -> None:
        """Join it to the outside. Raises `RunError`."""
        pid, outer, inner = str(self._holder.pid), f"out{self._number}", f"in{self._number}"
        ours = os.readlink("/proc/self/ns/net")
        for _ in range(200):
            if os.readlink(f"/proc/{pid}/ns/net") != ours:
                break
            await asyncio.sleep(0.01)
        _shell("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        _shell("ip", "link", "set", inner, "netns", pid)
        _shell("ip", "addr", "add", f"{self.gate}/24", "dev", outer)
        _shell("ip", "link", "set", outer, "up")
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address}/24", "dev", inner),
            ("link", "set", inner, "up"),
        ):
            _shell(*self.within("ip", *words))

    def within(self, *command: str) -> list[str]:
        """Return the command line by which a command runs there."""
        return ["nsenter", "-t", str(self._holder.pid), "-n", *command]

    def cut(self, ports: Sequence[int]) -> None:
        """Lose every packet to and from relays at these ports of its gate, from now on."""
        self._rules("-A", ports)

    def heal(self, ports: Sequence[int]) -> None:
        self._rules("-D", ports)

    def _rules(self, word: str, ports: Sequence[int]) -> None:
        for port in ports:
            there = ("-p", "tcp", "-d", self.gate, "--dport", str(port), "-j", "DROP")
            back = ("-p", "tcp", "-s", self.gate, "--sport", str(port), "-j", "DROP")
            _shell(*self.within("iptables", "-w", word, "OUTPUT", *there))
            _shell(*self.within("iptables", "-w", word, "INPUT", *back))

    def kill_all(self) -> None:
        """End whatever runs there without a word, until nothing does."""
        while True:
            found = [pid for pid in _in_network_of(self._holder.pid) if pid != self._holder.pid]
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def close(self) -> None:
        """End it, with what runs there still; its interfaces go with it."""
        self.kill_all()
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()


def _in_network_of(pid: int) -> list[int]:
    """Return the live processes that are in one network namespace with this one."""
    network, found = os.readlink(f"/proc/{pid}/ns/net"), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile; a zombie has no network
                if os.readlink(entry / "ns" / "net") == network:
                    found.append(int(entry.name))
    return found


def _shell(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
