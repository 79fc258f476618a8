"""Whether the time of a refusal tells how near a wrong key came to the right one.

One proxy knows a key. A client sends keys of the same length that begin as that one does, for a
quarter of its length and so on up to all but its last six characters, and then go on at random;
kinds in random order over one kept connection, and no key twice, because a head that came before is
read faster. Each kind is sent under two names, so that the difference of two names of one kind
shows what the machine itself adds.

Were keys compared from their beginning, those that share more would be refused later. So the ranks
of all times are held against the lengths that are shared: their correlation (Spearman's), in units
of what chance would give, is `z`. Beyond 4 in amount chance does it once in 16,000 runs, and the
command fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import orjson

from loadtest.run import RunError

SUMMARY = "whether the time of a refusal tells how near a wrong key is to the right one"
KEY_CHARS = 56
SHARED = (0, 14, 28, 42, 50)
Z_MAX = 4.0
PATIENCE_S = 60.0
WARM_UP = 200
_LETTERS = string.ascii_letters + string.digits


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Times in microseconds, by shared characters, each kind under two names."""

    times_us: dict[int, tuple[list[float], list[float]]]

    @property
    def medians_us(self) -> dict[int, tuple[float, float]]:
        return {
            shared: (statistics.median(one), statistics.median(other))
            for shared, (one, other) in self.times_us.items()
        }

    @property
    def z(self) -> float:
        """Return Spearman's correlation of shared length and time, over its deviation by chance."""
        pairs = [
            (shared, taken_us)
            for shared, names in self.times_us.items()
            for times in names
            for taken_us in times
        ]
        lengths, times = _ranks([p[0] for p in pairs]), _ranks([p[1] for p in pairs])
        return statistics.correlation(lengths, times) * math.sqrt(len(pairs) - 1)


def _ranks(values: list[float]) -> list[float]:
    """Return the rank of each, the mean of theirs for equal ones."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for index in order[at:end]:
            ranks[index] = (at + end - 1) / 2
        at = end
    return ranks


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--keys", type=int, default=2000, help="of each kind and name")
    command.add_argument("--seed", type=int, default=1, help="default %(default)s")
    command.add_argument("--quick", action="store_true", help="few keys")
    command.add_argument("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    finding = measure(60 if args.quick else args.keys, random.Random(args.seed))
    print(table(finding))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps({"z": finding.z, "us": finding.medians_us},
                                                 option=orjson.OPT_NON_STR_KEYS))  # fmt: skip
    return 0 if abs(finding.z) <= Z_MAX else 1


def measure(count: int, draw: random.Random) -> Finding:
    """Run the proxy and send `count` keys of each kind and name. Raises `RunError`."""
    right = "".join(draw.choices(_LETTERS, k=KEY_CHARS))
    kinds = [(shared, name) for shared in SHARED for name in (0, 1)] * count
    draw.shuffle(kinds)
    # All of them beforehand: to make a long rest takes longer, and the proxy would sleep deeper.
    wrong = [(*kind, _wrong(right, kind[0], draw)) for kind in kinds]
    first = [_wrong(right, 0, draw) for _ in range(WARM_UP)]
    times_us: dict[int, tuple[list[float], list[float]]] = {n: ([], []) for n in SHARED}
    with (
        tempfile.TemporaryDirectory(prefix="loadtest-guessing-") as folder,
        _proxy(Path(folder), right) as port,
        _line(port) as line,
    ):
        _expect(line, right, b"200")
        for key in first:
            _expect(line, key, b"401")
        for shared, name, key in wrong:
            times_us[shared][name].append(_expect(line, key, b"401") / 1000)
    return Finding(times_us=times_us)


def _wrong(right: str, shared: int, draw: random.Random) -> str:
    differs = draw.choice([letter for letter in _LETTERS if letter != right[shared]])
    rest = draw.choices(_LETTERS, k=KEY_CHARS - shared - 1)
    return right[:shared] + differs + "".join(rest)


def _expect(line: socket.socket, key: str, status: bytes) -> int:
    """Ask with a key; return how many nanoseconds the answer took."""
    head = f"GET /v1/models HTTP/1.1\r\nhost: d\r\nauthorization: Bearer {key}\r\n\r\n".encode()
    began_ns = time.perf_counter_ns()
    line.sendall(head)
    answer = line.recv(65536)
    taken_ns = time.perf_counter_ns() - began_ns
    if answer[9:12] != status:
        raise RunError(f"the proxy answers {answer[:40]!r} where {status.decode()} is right")
    return taken_ns


@contextlib.contextmanager
def _line(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield line


@contextlib.contextmanager
def _proxy(folder: Path, key: str) -> Iterator[int]:
    """Serve with one key; yield the port."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys = folder / "keys.json"
    keys.touch(mode=0o600)
    record = {"key_id": "one", "tenant": "t", "digest": digest}
    keys.write_text(json.dumps({"version": 1, "salt": "of a load test alone", "keys": [record]}))
    config = folder / "doherty.json"
    config.write_text(json.dumps({"tenants": [{"name": "t"}], "proxy": {"keys_path": str(keys)}}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    log = folder / "proxy.log"
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - its arguments are our own
            [
                *(sys.executable, "-m", "proxy", "--config", str(config), "--port", str(port)),
                *("--admin-port", "0", "--worker-urls", "http://127.0.0.1:9"),
                *("--access-log", "off"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        until_s = time.monotonic() + PATIENCE_S
        while b"listening on" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > until_s:
                raise RunError(f"the proxy did not come up: {log.read_text()[-1000:]}")
            time.sleep(0.02)
        yield port
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)


def table(finding: Finding) -> str:
    """Return the finding as text."""
    lines = [f"{'shared':>8}{'keys':>8}{'median us':>12}{'again':>10}"]
    medians = finding.medians_us
    for shared, (one, other) in medians.items():
        count = sum(map(len, finding.times_us[shared]))
        lines.append(f"{shared:>8}{count:>8}{one:>12.1f}{other:>10.1f}")
    both = [statistics.mean(pair) for pair in medians.values()]
    same = max(abs(one - other) for one, other in medians.values())
    lines.append(f"spread over kinds {max(both) - min(both):.1f} us; within a kind {same:.1f} us")
    lines.append(f"z {finding.z:+.2f} (beyond {Z_MAX:g} in amount: time tells)")
    return "\n".join(lines)
