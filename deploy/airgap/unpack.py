"""Archives of bundle.py become programs on a host without network. Standard library only.

    python3 deploy/airgap/unpack.py bundles/vllm bundles/doherty --to STAGE
    . STAGE/env.sh
    doherty up doherty.yaml                 # finds STAGE/bin/vllm

Each bundle is an environment of its own in STAGE/NAME, since the engines want different releases of
the same packages: its packages first, then those of the Python that runs this file. A program in
STAGE/bin sets what its engine needs where nothing else is set, so it can be started by anything.
The project itself is run from the checkout that holds this file.

Compile caches lie in STAGE/cache/NAME. `pack_cache.py` packs them; a NAME.cache.txz beside the
archives is unpacked. They are found again only under the same STAGE and the same model folder: the
compilers hash paths.

What is done is not done again: an archive that was unpacked, a bundle that was compiled.
"""

from __future__ import annotations

import argparse
import compileall
import concurrent.futures
import importlib.metadata
import json
import os
import py_compile
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.airgap import archives, kinds  # noqa: E402
from deploy.airgap.archives import ArchiveError, Part  # noqa: E402

LAUNCHER = '''#!{python}
"""{program} of the bundle in {environment}."""

import os
import sys

for name, value in {env!r}.items():
    os.environ.setdefault(name, value)
for name, folders in {paths!r}.items():
    there = [path for path in os.environ.get(name, "").split(":") if path and path not in folders]
    os.environ[name] = ":".join([*folders, *there])
os.execv(sys.executable, [sys.executable, *{entry!r}, *sys.argv[1:]])
'''
# As pip would have it. SGLang's module does nothing when it is run by `-m`; and what the engines
# spawn reads the main file again.
ENTRY = """import sys

from {module} import main

if __name__ == "__main__":
    sys.argv[0] = {program!r}
    sys.exit(main())
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unpack.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="of bundle.py")
    parser.add_argument("--to", type=Path, required=True, metavar="STAGE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--any-host", action="store_true", help="though made for another one")
    options = parser.parse_args(argv)
    stage = options.to.resolve()
    try:
        for folder in options.folders:
            unpack(folder.resolve(), stage, options.jobs, any_host=options.any_host)
        write_environment(stage)
    except ArchiveError as error:
        print(f"unpack: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def unpack(folder: Path, stage: Path, jobs: int, *, any_host: bool) -> None:
    """Make STAGE/NAME of one folder of archives, and its program."""
    begun_s = time.monotonic()
    manifest = archives.read_manifest(folder)
    kind = kinds.KINDS[manifest["name"]]
    if not any_host:
        _fits(folder, manifest)
    environment = stage / manifest["name"]
    files = _unpack_archives(folder, manifest, environment, jobs)
    unpacked_s = time.monotonic()
    _compile(manifest, environment, jobs)
    compiled_s = time.monotonic()
    write_launcher(stage, manifest["name"], kind)
    caches = _unpack_caches(folder, stage, manifest["name"])
    if (folder / archives.CRIU).exists():
        unpack_criu(folder / archives.CRIU, stage)
    ended_s = time.monotonic()
    print(
        f"{manifest['name']}: {files} files unpacked in {unpacked_s - begun_s:.1f} s, compiled in "
        f"{compiled_s - unpacked_s:.1f} s, {caches} caches unpacked in {ended_s - compiled_s:.1f} s"
        f"; run {stage / 'bin' / kind.program}",
        flush=True,
    )


def _fits(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a bundle that was made for another Python or torch."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here:
        raise ArchiveError(
            f"{folder} was made for Python {manifest['python']} and this is {here}; run unpack.py "
            f"with python{manifest['python']}, or make it anew with --host"
        )
    if not kinds.KINDS[manifest["name"]].slim:
        return  # it has nothing to do with torch
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise ArchiveError(
            f"this Python ({sys.executable}) has no torch, which the bundle in {folder} counts on; "
            "run unpack.py with the one that has"
        ) from None
    if torch.split("+")[0] != manifest["torch"].split("+")[0]:
        raise ArchiveError(
            f"{folder} was made for torch {manifest['torch']} and this is {torch}; "
            "make it anew with --host, and a lock of an engine release for that torch"
        )


# --- files ----------------------------------------------------------------------------------------


def packages(environment: Path) -> Path:
    """Return where a bundle's packages lie."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment / "lib" / version / "site-packages"


def _unpack_archives(folder: Path, manifest: dict[str, Any], environment: Path, jobs: int) -> int:
    stamp = environment / ".unpacked.json"
    done = _stamped(stamp)
    if done and done[0] != manifest["key"]:
        shutil.rmtree(environment)  # of another bundle
        done = []
    target = packages(environment)
    target.mkdir(parents=True, exist_ok=True)
    todo = [record for record in manifest["archives"] if record["digest"] not in done]
    parts = [[Part(**part) for part in record["parts"]] for record in todo]
    done = done or [manifest["key"]]
    files = 0
    with concurrent.futures.ProcessPoolExecutor(max(1, min(jobs, len(todo)))) as pool:
        work = {
            pool.submit(archives.unpack, folder, each, target): record["digest"]
            for each, record in zip(parts, todo, strict=True)
        }
        for one in concurrent.futures.as_completed(work):
            files += one.result()
            done.append(work[one])
            _replace(stamp, json.dumps(done))
    return files


def _stamped(stamp: Path) -> list[str]:
    try:
        done = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return []
    return done if isinstance(done, list) else []


def _compile(manifest: dict[str, Any], environment: Path, jobs: int) -> None:
    """Translate every module once. A wheel's times are not to be believed, so its octets count;
    and since nobody edits it here, they are not read again at each start."""
    stamp = environment / ".compiled"
    if stamp.exists() and stamp.read_text() == manifest["key"]:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escapes
        compileall.compile_dir(
            packages(environment),
            maxlevels=30,
            quiet=2,  # packages carry templates that are no Python
            workers=jobs,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    _replace(stamp, manifest["key"])


def _unpack_caches(folder: Path, stage: Path, name: str) -> int:
    """Unpack carried compile caches, each once; what is newer on the host stays."""
    count = 0
    for path in sorted(folder.glob("*.cache.txz")):
        status = path.stat()
        stamp = stage / "cache" / f".{path.name}.{status.st_size}.{int(status.st_mtime)}"
        if stamp.exists():
            continue
        target = stage / "cache" / name
        target.mkdir(parents=True, exist_ok=True)
        try:
            with tarfile.open(path, "r:xz") as archive:
                archive.extractall(target, filter="data")
        except (OSError, tarfile.TarError, EOFError) as error:
            raise ArchiveError(f"{path} cannot be unpacked ({error}); remove it") from error
        stamp.touch()
        count += 1
    return count


def unpack_criu(path: Path, stage: Path) -> None:
    """Make STAGE/criu, which env.sh names to Doherty. Raises `ArchiveError`."""
    try:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(stage / "criu", filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ArchiveError(f"{path} cannot be unpacked ({error}); copy it again") from error


# --- programs -------------------------------------------------------------------------------------


def write_launcher(stage: Path, name: str, kind: kinds.Kind) -> None:
    """Make STAGE/NAME an environment, and STAGE/bin/PROGRAM one that runs in it."""
    environment = stage / name
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    for link in (python, python.with_name("python3")):
        link.unlink(missing_ok=True)
        link.symlink_to(base)
    version = ".".join(map(str, sys.version_info[:3]))
    settings = ("include-system-site-packages = false", f"version = {version}")  # zz_host.pth adds
    _replace(environment / "pyvenv.cfg", "\n".join((f"home = {base.parent}", *settings, "")))
    lines = [f"import site; site.addsitedir({path!r})" for path in _host_packages(stage)]
    if not kind.slim:
        lines.insert(0, str(ROOT))  # the project as sources
    packages(environment).mkdir(parents=True, exist_ok=True)
    _replace(packages(environment) / "zz_host.pth", "".join(f"{line}\n" for line in lines))
    caches = {key: str(stage / "cache" / name / value) for key, value in kind.caches.items()}
    paths = {"PATH": [str(stage / "bin")]}
    if kind.cuda_libraries and (libraries := _cuda_libraries(stage)):
        paths["LD_LIBRARY_PATH"] = libraries
    entry = environment / "bin" / f"{kind.program}-entry.py"
    _replace(entry, ENTRY.format(module=kind.module, program=kind.program))
    # Beside the program its Python, for what else runs in the environment: engine workers.
    for command, words in ((kind.program, [str(entry)]), (f"{kind.program}-python", [])):
        text = LAUNCHER.format(
            python=python,
            program=command,
            environment=environment,
            env=kind.env | caches,
            paths=paths,
            entry=words,
        )
        program = stage / "bin" / command
        program.parent.mkdir(parents=True, exist_ok=True)
        _replace(program, text)
        program.chmod(0o755)


def _host_packages(stage: Path) -> list[str]:
    """Return the folders of this Python's own packages, also when it is one of the stage."""
    return [
        path
        for path in dict.fromkeys(sys.path)
        if Path(path).name in ("site-packages", "dist-packages")
        and stage not in Path(path).resolve().parents
    ]


def _cuda_libraries(stage: Path) -> list[str]:
    """Return the folder of libcudart: of the toolkit that nvcc is of, else of torch's packages."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1] / "lib64"] if nvcc else []
    for packages_folder in _host_packages(stage):
        folders += sorted(Path(packages_folder).glob("nvidia/*/lib"))
    return next(([str(path)] for path in folders if any(path.glob("libcudart.so*"))), [])


def write_environment(stage: Path) -> None:
    """Write STAGE/env.sh: programs on the path, and the Python that has the project's packages."""
    _replace(stage / "env.sh", "".join(f"{line}\n" for line in _environment(stage)))


def _environment(stage: Path) -> Iterator[str]:
    yield f"# Source it: . {stage}/env.sh"
    folders = [stage / "bin"]
    if (stage / "doherty" / "bin" / "python").exists():
        folders.append(stage / "doherty" / "bin")  # python3 -m loadtest, python3 -m backends.cli
    yield f'export PATH="{":".join(map(str, folders))}:$PATH"'
    yield f'export STAGE="{stage}"'
    if (stage / "criu" / "criu").exists():
        yield f'export DOHERTY_CRIU="{stage}/criu/criu"'
    for name, value in kinds.OFFLINE.items():
        yield f'export {name}="{value}"'


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
