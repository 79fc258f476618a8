"""Packs the routers of others for a machine without a package index: one folder with `bin/`.

    python3 loadtest/gpu/pack_rivals.py --out .gpu/rivals            # two archives and nginx
    python3 loadtest/gpu/pack_rivals.py --unpack .gpu/rivals --to /opt/stage/rivals

Made where pip works, for the host's Python (--python 3.12): sglang-router and vllm-router with what
they import, machine code stripped of its symbols, and this machine's nginx with the libraries that
a bare host may lack. Unpacked, bin/sglang-router, bin/vllm-router and bin/nginx run as they stand;
`gpu fleet --rivals FOLDER` finds them. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROUTERS = {
    "sglang": ("sglang-router==0.3.2", "sglang-router", "sglang_router.cli"),
    "vllm": ("vllm-router==0.1.17", "vllm-router", "vllm_router.launch_router"),
}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")
# Of the C library: a host has its own, and two do not go together.
OF_EVERY_HOST = re.compile(r"^(ld-linux|libc|libm|libdl|libpthread|librt)[-.]")
LEFT_OUT = ("*.pyi", "*/tests/*", "*/__pycache__/*")
SITE_LAUNCHER = """\
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here/site" exec {python} -c 'import sys; sys.argv[0] = "{name}"
from {module} import main
sys.exit(main())' "$@"
"""
NGINX_LAUNCHER = """\
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
LD_LIBRARY_PATH="$here/nginx" exec "$here/nginx/nginx" "$@"
"""


class PackError(Exception):
    """It cannot be packed; the text says why."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pack_rivals.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder of the archives")
    add("--python", default="3.12", help="release of the host's (%(default)s)")
    add("--only", choices=(*ROUTERS, "nginx"), help="this one alone")
    add("--unpack", type=Path, metavar="FOLDER", help="of archives, on the host")
    add("--to", type=Path, help="where they are unpacked")
    options = parser.parse_args(argv)
    try:
        if options.unpack is not None and options.to is not None:
            unpack(options.unpack, options.to)
        elif options.out is not None:
            pack(options.out, options.python, options.only)
        else:
            parser.error("give --out, or --unpack with --to")
    except (PackError, OSError, tarfile.TarError, subprocess.CalledProcessError) as error:
        print(f"pack_rivals: {error}", file=sys.stderr)
        return 1
    return 0


def pack(out: Path, python: str, only: str | None) -> None:
    """Make an archive of each, which is complete in itself."""
    out.mkdir(parents=True, exist_ok=True)
    for name in [only] if only else [*ROUTERS, "nginx"]:
        with tempfile.TemporaryDirectory(prefix="doherty-rivals-") as folder:
            root = Path(folder)
            (root / "bin").mkdir()
            if name == "nginx":
                _nginx(root)
            else:
                _router(root, name, python)
            path = out / f"{name}.tar.xz"
            with tarfile.open(path, "w:xz", preset=6) as archive:
                archive.add(root, arcname=".")
        print(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB")


def _router(root: Path, name: str, python: str) -> None:
    requirement, program, module = ROUTERS[name]
    site = root / "site"
    short = python.replace(".", "")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site)]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command += ["--abi", f"cp{short}", "--abi", "abi3", "--abi", "none"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, requirement], check=True)  # noqa: S603 - words of ours
    for pattern in LEFT_OUT:
        for path in site.rglob(pattern.rpartition("/")[2]):
            if path.is_file() and path.match(pattern):
                path.unlink()
    if (strip := shutil.which("strip")) is not None:
        for library in site.rglob("*.so"):
            words = [strip, "--strip-unneeded", str(library)]
            subprocess.run(words, check=False)  # noqa: S603 - words of ours
    launcher = SITE_LAUNCHER.format(python=f"python{python}", name=program, module=module)
    _program(root / "bin" / program, launcher)


def _nginx(root: Path) -> None:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise PackError("nginx: not installed here; apt-get install nginx-light")
    folder = root / "nginx"
    folder.mkdir()
    shutil.copy(found, folder / "nginx")
    words = [shutil.which("ldd") or "ldd", found]
    listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: S603
    for match in re.finditer(r"=> (/\S+)", listed):
        library = Path(match[1])
        if not OF_EVERY_HOST.match(library.name):
            shutil.copy(library, folder / library.name)
    _program(root / "bin" / "nginx", NGINX_LAUNCHER)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def unpack(folder: Path, target: Path) -> None:
    """Unpack every archive of `folder` into one tree."""
    archives = sorted(folder.glob("*.tar.xz"))
    if not archives:
        raise PackError(f"{folder}: holds no archive; see --out")
    target.mkdir(parents=True, exist_ok=True)
    for path in archives:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(target, filter="data")
    print(f"{target}: {', '.join(sorted(os.listdir(target / 'bin')))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
