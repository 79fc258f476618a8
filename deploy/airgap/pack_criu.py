"""A CRIU with the libraries that it needs, to be carried along with a bundle.

    python3 deploy/airgap/pack_criu.py BUNDLE

fetches it by `deploy/criu.sh`, where there is a mirror of Debian's packages, and writes
BUNDLE/criu.txz (4 MiB). `unpack.py` makes STAGE/criu of it, and env.sh names that to Doherty, which
keeps images of warm replicas by it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.airgap import archives  # noqa: E402


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pack_criu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="folder of bundle.py's archives"
    )
    parser.add_argument(
        "--folder", type=Path, help="where it is kept (~/.cache/doherty-airgap/criu)"
    )
    options = parser.parse_args(argv)
    folder = options.folder or Path.home() / ".cache" / "doherty-airgap" / "criu"
    script = ROOT / "deploy" / "criu.sh"
    if subprocess.run(["sh", str(script), str(folder)], check=False).returncode:
        print(f"pack_criu: {script.name} could not fetch it, as it says above", file=sys.stderr)
        return 1
    try:
        target = pack(folder, options.bundle)
    except OSError as error:
        print(f"pack_criu: {error}", file=sys.stderr)
        return 1
    print(f"{target.stat().st_size:>12,} {target}")
    return 0


def pack(folder: Path, bundle: Path) -> Path:
    """Write the archive, whole or not at all. Raises `OSError`."""
    target = bundle / archives.CRIU
    new = target.with_name(f".{target.name}.new")
    with tarfile.open(new, "w:xz") as archive:
        archive.add(folder, arcname=".")
    return new.replace(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
