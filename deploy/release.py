"""Make what a release is: wheel, source distribution, bill of materials, checksums.

    python3 deploy/bootstrap.py release              into dist/
    python3 deploy/bootstrap.py release --draft      of what is no release yet, too

Whoever has the commit, this Python and the setuptools that the wheel names in its file WHEEL gets
the same octets. So everything is built twice, in other folders and under other settings, and a
difference is an error. Three things make it so: the sources are copied out of git (nothing that
lies about can slip in), times are the commit's
(https://reproducible-builds.org/specs/source-date-epoch/), and the archive of sources is packed
here, because setuptools keeps times, modes and owners of the folder that it packs. The wheel is
made of that archive, which shows that the archive is whole.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))  # where this is loaded by others
import release_checks  # noqa: E402
from release_checks import ReleaseError  # noqa: E402

OTHERWISE = {"TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
PYTHON = platform.python_version()
SHIPPED_EXTRAS = (
    "docker",
    "jwt",
    "otel",
    "postgres",
    "top",
)  # small ones, that run beside the proxy


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bootstrap.py release", description="Build a release, twice, and check what is in it."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--draft", action="store_true", help="whatever CHANGELOG and git say")
    args = parser.parse_args(argv)
    try:
        release(args.out, draft=args.draft)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def release(out: Path, *, draft: bool) -> None:
    version = project_version()
    if not draft:
        if git("status", "--porcelain"):
            raise ReleaseError("the tree differs from its commit; commit first, or pass --draft")
        release_checks.check_changelog((ROOT / "CHANGELOG.md").read_text("utf-8"), version)
    epoch_s = commit_time_s()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="doherty-release-") as name:
        first = build(Path(name, "first"), epoch_s)
        second = build_otherwise(Path(name, "second", "deeper"), epoch_s)
        for one, other in zip(first, second, strict=True):
            if sha256(one) != sha256(other):
                raise ReleaseError(f"{one.name} differs when it is built again")
        release_checks.check(*first, sources=tracked(), root=ROOT, version=version)
        made = [Path(shutil.copy(path, out)) for path in first]
        materials = out / f"doherty-{version}.cdx.json"
        made.append(bill_of_materials(made[0], materials, Path(name, "installed"), epoch_s))
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in made)
    (out / "SHA256SUMS").write_text(sums)
    print(f"built with setuptools {importlib.metadata.version('setuptools')}, Python {PYTHON}")
    for path in made:
        print(f"{sha256(path)}  {path.stat().st_size / 1024:6.0f} KiB  {path}")


# --- what it is made of ---------------------------------------------------------------------------


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"])


def git(*args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ReleaseError("git is not installed; a release is built from a checkout") from None
    if done.returncode:
        raise ReleaseError(
            f"git {args[0]}: {done.stderr.strip()}; a release is built from a checkout"
        )
    return done.stdout.strip()


def commit_time_s() -> int:
    return int(git("log", "-1", "--format=%ct"))


def tracked() -> tuple[str, ...]:
    """Return the files of the checkout that git knows and that are there, in order."""
    names = git("ls-files", "-z").split("\0")
    return tuple(sorted(name for name in names if name and (ROOT / name).is_file()))


# --- building -------------------------------------------------------------------------------------


def build(
    folder: Path, epoch_s: int, environment: Mapping[str, str] | None = None
) -> tuple[Path, Path]:
    """Build wheel and source distribution in a new `folder`, from the checkout's tracked files."""
    env = {**os.environ, **(environment or {}), "SOURCE_DATE_EPOCH": str(epoch_s)}
    env.pop("PYTHONPATH", None)
    tree, raw = folder / "tree", folder / "raw"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    run_build("sdist", tree, raw, env)
    (packed,) = raw.iterdir()
    sdist = folder / packed.name
    repack(packed, sdist, epoch_s)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (inner,) = (folder / "unpacked").iterdir()
    run_build("wheel", inner, folder / "wheel", env)
    (wheel,) = (folder / "wheel").iterdir()
    return wheel, sdist


def build_otherwise(folder: Path, epoch_s: int) -> tuple[Path, Path]:
    """Build as somebody else would: what differs here must show in nothing."""
    before = os.umask(0o077)
    try:
        return build(folder, epoch_s, OTHERWISE)
    finally:
        os.umask(before)


def run_build(kind: str, source: Path, out: Path, env: Mapping[str, str]) -> None:
    words = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source))
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=env, umask=0o022, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-12:]
        raise ReleaseError("\n".join((f"the {kind} cannot be built:", *said)))


def repack(packed: Path, target: Path, epoch_s: int) -> None:
    """Pack again what setuptools packed, with nothing in it of the machine that it was done on."""
    with (
        tarfile.open(packed) as source,
        target.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=epoch_s) as octets,
        tarfile.open(fileobj=octets, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in sorted(source.getmembers(), key=lambda one: one.name):
            clean = tarfile.TarInfo(member.name)
            clean.type, clean.size, clean.mtime = member.type, member.size, epoch_s
            clean.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            archive.addfile(clean, source.extractfile(member) if member.isfile() else None)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- bill of materials ----------------------------------------------------------------------------


def bill_of_materials(wheel: Path, target: Path, folder: Path, epoch_s: int) -> Path:
    """Write what an installation of `wheel` holds now, as CycloneDX."""
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    as_json = ["--output-reproducible", "--output-format", "JSON"]
    of_project: list[str | Path] = ["--pyproject", ROOT / "pyproject.toml", "--output-file", target]
    commands: tuple[list[str | Path], ...] = (
        [sys.executable, "-m", "venv", "--without-pip", folder],
        [*pip, "--python", python, "install", f"{wheel}[{','.join(SHIPPED_EXTRAS)}]"],
        [sys.executable, "-m", "cyclonedx_py", "environment", *as_json, *of_project, python],
    )
    for command in commands:
        env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ReleaseError(f"{command[2]} failed: {done.stderr.strip()[-500:]}")
    # Where pip found the wheel is this machine's matter.
    text = re.sub(r"file://[^\"#]*/", "file:///", target.read_text("utf-8"))
    target.write_text(text, "utf-8")
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
