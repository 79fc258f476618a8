"""The compile caches that a bundle's engine made on the host, as one file to carry back.

    python3 deploy/airgap/pack_cache.py STAGE vllm OUT

writes OUT/vllm.cache.txz. Put beside the bundle's archives, it is unpacked with them, and a bare
host starts warm; under the same STAGE and model folder, since the compilers hash paths.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.airgap import kinds  # noqa: E402

_LEFT_OUT = (".lock", ".tmp", ".pid")  # of processes that are gone


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pack_cache.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", type=Path, metavar="STAGE")
    parser.add_argument("name", choices=sorted(k for k, kind in kinds.KINDS.items() if kind.caches))
    parser.add_argument("out", type=Path, metavar="OUT")
    options = parser.parse_args(argv)
    source = options.stage.resolve() / "cache" / options.name
    if not source.is_dir() or not any(source.iterdir()):
        print(
            f"pack_cache: {source} holds nothing; start the engine once by "
            f"{options.stage / 'bin' / options.name}",
            file=sys.stderr,
        )
        return 1
    begun_s = time.monotonic()
    target = pack(source, options.out, options.name)
    size_mib = target.stat().st_size / (1 << 20)
    print(f"{target}: {size_mib:.1f} MiB in {time.monotonic() - begun_s:.1f} s")
    return 0


def pack(source: Path, out: Path, name: str) -> Path:
    """Write the cache as a whole, or leave what was there."""
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{name}.cache.txz"
    new = out / f".{name}.{os.getpid()}.new"
    with tarfile.open(new, "w:xz", preset=6) as archive:
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.suffix not in _LEFT_OUT:
                archive.add(path, path.relative_to(source).as_posix())
    new.replace(target)
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
