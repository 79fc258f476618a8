"""What a GPU host is and has, for `bundle.py --host`. Standard library only; run it there.

    python3 deploy/airgap/host.py > host.json

It imports no package: torch alone takes seconds, and its version and CUDA's stand in its files.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

_QUERY = "name,compute_cap,memory.total,driver_version"


def main() -> int:
    print(json.dumps(describe(), indent=1))
    return 0


def describe() -> dict[str, object]:
    """Return the host as values."""
    packages: dict[str, str] = {}
    for package in importlib.metadata.distributions():  # the first on the path is what is imported
        packages.setdefault(package.metadata["Name"], package.version)
    cards = gpus()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "cores": len(os.sched_getaffinity(0)),
        "torch": packages.get("torch", ""),
        "cuda": torch_cuda() or "",
        "arch": max((int(str(card["arch"])) for card in cards), default=0),
        "gpus": cards,
        "nvcc": nvcc_release(),
        "compiler": shutil.which("cc") or shutil.which("gcc") or "",
        "packages": dict(sorted(packages.items())),
    }


def gpus() -> list[dict[str, object]]:
    """Return each card's name, compute capability times ten, memory and driver."""
    text = _output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    return [card for line in text.splitlines() if (card := read_card(line)) is not None]


def read_card(line: str) -> dict[str, object] | None:
    """Read one line of nvidia-smi's table."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d", fields[1]):
        return None
    arch = int(fields[1].replace(".", ""))
    return {"name": fields[0], "arch": arch, "memory_mib": fields[2], "driver": fields[3]}


def torch_cuda() -> str | None:
    """Return the CUDA release that torch was built with, from its own file."""
    try:
        files = importlib.metadata.files("torch") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if str(file) == "torch/version.py":
            text = Path(str(file.locate())).read_text()
            match = re.search(r"^cuda\b.*?=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
            return match[1] if match else None
    return None


def nvcc_release() -> str:
    """Return the compiler's release, or nothing."""
    match = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return match[1] if match else ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
