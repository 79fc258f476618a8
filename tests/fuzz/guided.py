"""Coverage-guided runs of one target, by atheris (libFuzzer underneath)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["proxy"]):
    import proxy.core.http1
    import proxy.core.prefix
    import proxy.core.routes
    import proxy.core.scan
    import proxy.core.session
    import proxy.core.sse
    import proxy.core.usage  # noqa: F401 - instrumented as they load

from tests.fuzz.targets import FOLDER, TARGETS, kept

_INPUT_BYTES_MAX = 4096


def _write_begun(name: str, folder: Path) -> None:
    begun = [(f"seed-{n}", octets) for n, octets in enumerate(TARGETS[name].seeds())]
    for label, octets in (*begun, *kept(name)):
        (folder / label.replace("/", "-")).write_bytes(octets)


def run(name: str, seconds: int, corpus: Path | None) -> int:
    """Fuzz one target; libFuzzer prints its counts and ends the process with its own status."""
    target = TARGETS[name]
    crashes = FOLDER / "crashes" / name
    crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = corpus or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        _write_begun(name, folder)
        options = (
            f"-max_total_time={seconds}",
            f"-max_len={_INPUT_BYTES_MAX}",
            f"-artifact_prefix={crashes}/",
            "-print_final_stats=1",
            "-timeout=5",
        )
        atheris.Setup([sys.argv[0], *options, str(folder)], target.law)
        atheris.Fuzz()
    return 0
