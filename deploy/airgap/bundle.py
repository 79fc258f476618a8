"""Archives with what a GPU host without network lacks, made on a machine with pip and no GPU.

    python3 deploy/airgap/bundle.py vllm    --host host.json --out bundles/vllm
    python3 deploy/airgap/bundle.py sglang  --host host.json --out bundles/sglang
    python3 deploy/airgap/bundle.py doherty --host host.json --out bundles/doherty

`host.json` is what `host.py` prints on the host; --python, --torch, --cuda and --arch describe one
that is out of reach. Wheels are fetched once, the site is made once for its inputs, and each
archive is written once for its files: what was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.airgap import archives, fatbin, kinds, wheels  # noqa: E402
from deploy.airgap.archives import ArchiveError, Member, Part  # noqa: E402
from deploy.airgap.wheels import Host, Left, WheelError  # noqa: E402

LOCKS = Path(__file__).resolve().parent / "locks"
MIB = 1 << 20
# Small libraries gain nothing from strip, and each call costs a process.
STRIP_BYTES_MIN = 300_000
SITES_KEPT = 3
# Of a host that is not described: what the locks were made for.
DEFAULTS = Host(python="3.12", torch="2.11.0", cuda="13.0", arch=90)
DESCRIBED_BY = ("python", "torch", "cuda", "arch")  # options of these names
TOOLS = ("zstandard>=0.22,<1",)  # BSD-3; to look inside compressed GPU code


class TooLargeError(Exception):
    """The archives come to more than was allowed."""


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    try:
        _check(options)
        host = _host(options)
        bundle(options, host)
    except (WheelError, ArchiveError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    except TooLargeError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bundle.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", choices=sorted(kinds.KINDS))
    add("--out", type=Path, required=True, help="folder of the archives")
    add("--host", type=Path, help="what host.py printed on the host")
    add("--python", type=_release, help=f"of the host, without --host ({DEFAULTS.python})")
    add("--torch", type=_release, help=f"of the host, without --host ({DEFAULTS.torch})")
    add("--cuda", type=_release, help=f"of the host, without --host ({DEFAULTS.cuda})")
    add("--arch", type=int, help=f"compute capability times ten ({DEFAULTS.arch})")
    add("--lock", type=Path, help="packages and versions (the newest of the bundle in locks/)")
    add("--archive-mib", type=_positive, default=60, help="bound of one file (%(default)s)")
    add("--total-mib", type=_positive, help="bound of all files together")
    add("--cache", type=Path, help="folder of wheels and sites (~/.cache/doherty-airgap)")
    add("--find-links", type=Path, help="folder of wheels, in place of a package index")
    add("--full", action="store_true", help="leave nothing behind, blank nothing")
    add("--heads", default="128", help="sizes of attention heads to keep (%(default)s)")
    add("--keep-fp8", action="store_true", help="keep attention over an FP8 KV cache")
    add("--keep-fp16", action="store_true", help="keep attention in fp16")
    add("--jobs", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv, argparse.Namespace(command=shlex.join(["bundle.py", *argv])))


def _release(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no release, such as 3.12")
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return value


def _check(options: argparse.Namespace) -> None:
    """Refuse what would be passed over, or only found wrong after minutes of work."""
    if options.find_links is not None and not options.find_links.is_dir():
        raise WheelError(f"--find-links: there is no folder {options.find_links}")


def _host(options: argparse.Namespace) -> Host:
    values = {name: getattr(options, name) for name in DESCRIBED_BY}
    told = {name: value for name, value in values.items() if value is not None}
    if options.host is None:
        return DEFAULTS._replace(**told)
    host = wheels.read_host(options.host)
    if not host.arch:  # its card was not seen
        host = host._replace(arch=told.pop("arch", DEFAULTS.arch))
    if told:
        raise WheelError(f"--{next(iter(told))}: {options.host} tells it; leave one of them out")
    return host


def bundle(options: argparse.Namespace, host: Host) -> None:
    """Make every archive of one bundle and, last, its manifest."""
    kind = kinds.KINDS[options.name]
    cache = options.cache or Path.home() / ".cache" / "doherty-airgap"
    lock = options.lock or _newest_lock(options.name)
    try:
        text = lock.read_text()
    except OSError as error:
        raise WheelError(f"the lock {lock} cannot be read: {error.strerror}") from error
    wanted = wheels.read_lock(text, lock.name)
    lacking = wheels.lacking(wanted, host)
    step = _Steps()
    fetched = wheels.fetch(lacking, host, cache / "wheels", options.find_links)
    step.end(f"{len(fetched)} wheels of {len(wanted)} packages, the host has the others")
    site, report = _site(options, kind, host, fetched, cache)
    unmet = wheels.unmet(site, host, wheels.goes_without(text))
    step.end(f"site of {report['files']} files, {report['bytes'] / MIB:.0f} MiB")
    manifest = {
        "format": archives.FORMAT,
        "name": options.name,
        "python": host.python_minor,
        "torch": host.torch,
        "cuda": host.cuda,
        "arch": host.arch,
        "unmet": unmet,
        "versions": {line.name: line.version for line in lacking},
        "command": options.command,
        **report,
    }
    records = _archive(options, site)
    step.end(f"{len(records)} archives")
    total_bytes = sum(part["bytes"] for record in records for part in record["parts"])
    _write(options.out / archives.MANIFEST, manifest | {"archives": records, "bytes": total_bytes})
    for record in records:
        for part in record["parts"]:
            print(f"{part['bytes']:>12,} {part['file']}")
    print(f"{total_bytes:>12,} in all ({total_bytes / MIB:.1f} MiB), in {options.out}")
    for name in unmet:
        print(f"neither here nor on the host: {name}")


def _newest_lock(name: str) -> Path:
    found = sorted(
        LOCKS.glob(f"{name}*.lock"), key=lambda p: [*map(int, re.findall(r"\d+", p.name))]
    )
    if not found:
        raise WheelError(f"{LOCKS} has no lock of {name}; name one with --lock")
    return found[-1]


class _Steps:
    """Says what each step came to, and its seconds."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()

    def end(self, text: str) -> None:
        now_s = time.monotonic()
        print(f"{now_s - self._begun_s:7.1f} s  {text}", flush=True)
        self._begun_s = now_s


# --- site -----------------------------------------------------------------------------------------


def _site(
    options: argparse.Namespace,
    kind: kinds.Kind,
    host: Host,
    fetched: Sequence[Path],
    cache: Path,
) -> tuple[Path, dict[str, Any]]:
    """Make the folder of these wheels under these rules, once."""
    pruned = not options.full and kind.arch in (0, host.arch)
    if not options.full and not pruned:
        print(f"no rules for {host.arch / 10}, only for {kind.arch / 10}: little is left out")
    rules = (*(() if options.full else kinds.EVERYWHERE), *(kind.leave if pruned else ()))
    leave = [(rule.pattern, rule.why) for rule in rules]
    heads = tuple(int(text) for text in options.heads.split(","))
    drop = kinds.attention_drop(heads, keep_fp8=options.keep_fp8, keep_fp16=options.keep_fp16)
    slims = {rule.pattern: drop if rule.attention else "" for rule in kind.slim} if pruned else {}
    inputs = [
        *(f"{path.name} {path.stat().st_size}" for path in fetched),
        *(str(host.arch), repr(leave), repr(slims), _sources()),
    ]
    site = cache / "sites" / f"{options.name}-{_digest(inputs)[:16]}"
    stamp = site.with_suffix(".json")
    if stamp.exists():
        return site, json.loads(stamp.read_text())
    shutil.rmtree(site, ignore_errors=True)  # of a run that was cut off
    site.mkdir(parents=True)
    left: dict[str, Left] = {}
    for wheel in fetched:
        wheels.unpack_wheel(wheel, site, leave, left)
    if pruned:
        _strip(site)
    slimmed = {
        pattern: _slim(site / pattern, host.arch, text, cache)
        for pattern, text in slims.items()
        if (site / pattern).exists()
    }
    members = archives.list_members(site)
    report = {
        "key": _digest(inputs),
        "files": len(members),
        "bytes": sum(member.content_bytes for member in members),
        "left_out": {pattern: rule._asdict() for pattern, rule in sorted(left.items())},
        "slimmed": slimmed,
    }
    _write(stamp, report)
    _forget_sites(site.parent, options.name)
    return site, report


def _forget_sites(folder: Path, name: str) -> None:
    """Keep the newest sites of a bundle: one with FP8 and one without, say. Each is a gigabyte."""
    stamps = sorted(folder.glob(f"{name}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    for stamp in stamps[:-SITES_KEPT]:
        shutil.rmtree(stamp.with_suffix(""), ignore_errors=True)
        stamp.unlink()


def _sources() -> str:
    """Return what stands for the rules' own code, so that a change of it makes sites anew."""
    folder = Path(__file__).resolve().parent
    names = ("fatbin.py", "wheels.py", "kinds.py")
    return _digest((folder / name).read_text() for name in names)


def _strip(site: Path) -> None:
    """Take the symbols that only a debugger reads out of the libraries, where strip is there."""
    program = shutil.which("strip")
    large = [
        str(path)
        for path in site.rglob("*.so*")
        if path.is_file() and path.stat().st_size > STRIP_BYTES_MIN
    ]
    if program and large:  # one that it cannot read stays as it is
        command = [program, "--strip-unneeded", *sorted(large)]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _slim(path: Path, arch: int, drop: str, cache: Path) -> dict[str, int]:
    """Blank what `arch` does not need; blanked octets become holes."""
    library = path.read_bytes()
    try:
        found = fatbin.slim(
            library,
            arch,
            re.compile(drop.encode()) if drop else None,
            _decompress(cache) if drop else None,
        )
    except fatbin.FatbinError as error:
        raise WheelError(f"{path.name}: {error}; give --full to carry it as it is") from error
    new = path.with_suffix(".new")
    with new.open("wb") as sink:
        at = 0
        for start, size in sorted(found.blanks):
            sink.write(memoryview(library)[at:start])
            at = start + size
            sink.seek(at)
        sink.write(memoryview(library)[at:])
        sink.truncate(len(library))
    new.chmod(path.stat().st_mode)
    new.replace(path)
    kept = {"kept_bytes": found.kept_bytes, "blanked_bytes": found.blanked_bytes}
    return kept | {"containers": found.containers, "dropped": found.dropped}


def _decompress(cache: Path) -> Callable[[bytes, int], bytes]:
    """Return zstd's decompression, from a package that is fetched once where it is not there."""
    tools = cache / "tools"
    sys.path.append(str(tools))
    try:
        zstandard = importlib.import_module("zstandard")  # only some libraries need it
    except ImportError:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--root-user-action=ignore", "--target", str(tools), *TOOLS]
        if subprocess.run(pip, check=False).returncode:
            raise WheelError("pip could not fetch zstandard; install it, or give --full") from None
        importlib.invalidate_caches()  # the folder was not there when it was looked for
        zstandard = importlib.import_module("zstandard")

    def plain(data: bytes, size: int) -> bytes:
        return bytes(zstandard.ZstdDecompressor().decompress(data, max_output_size=size))

    return plain


# --- archives -------------------------------------------------------------------------------------


def _archive(options: argparse.Namespace, site: Path) -> list[dict[str, Any]]:
    """Write every archive that is not there yet; what is not of this bundle's goes."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    part_bytes = int(options.archive_mib * MIB)
    if part_bytes < 1:
        raise ArchiveError("--archive-mib must be more than 0")
    shares = archives.share_out(archives.list_members(site))
    known = _known(out)
    plan = {
        f"{options.name}-{index}.tar.xz": (
            _digest([repr(share), str(part_bytes)]),
            share,
        )
        for index, share in enumerate(shares, 1)
    }
    records = {
        stem: known[digest]
        for stem, (digest, _) in plan.items()
        if digest in known and _whole(out, known[digest]["parts"])
    }
    parts = [part for record in records.values() for part in record["parts"]]
    budget = _Budget(options)
    budget.spend(sum(part["bytes"] for part in parts))
    _sweep(out, {part["file"] for part in parts})
    largest_first = sorted(
        (stem for stem in plan if stem not in records),
        key=lambda stem: -sum(member.content_bytes for member in plan[stem][1]),
    )
    pool = concurrent.futures.ThreadPoolExecutor(max(1, options.jobs))  # xz lets go of the GIL
    try:
        work = {
            pool.submit(_pack, site, plan[stem], out / stem, part_bytes, budget.spend): stem
            for stem in largest_first
        }
        for done in concurrent.futures.as_completed(work):
            records[work[done]] = done.result()
            _write(out / ".progress.json", {"archives": list(records.values())})
    finally:
        pool.shutdown(cancel_futures=True)
    (out / ".progress.json").unlink(missing_ok=True)
    return [records[stem] for stem in plan]


class _Budget:
    """What all archives together may come to, so that too much is told while they are written."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._spent_bytes = 0

    def spend(self, size_bytes: int) -> None:
        total_mib = self._options.total_mib
        with self._lock:
            self._spent_bytes += size_bytes
            if total_mib is None or self._spent_bytes <= total_mib * MIB:
                return
        remedy = "allow more"
        if self._options.full:
            remedy = "leave out --full"
        elif self._options.host is None:
            remedy = "give --host, so that what the host has stays out"
        raise TooLargeError(f"the archives are more than --total-mib allows; {remedy}")


def _pack(
    site: Path,
    planned: tuple[str, list[Member]],
    target: Path,
    part_bytes: int,
    spend: Callable[[int], None],
) -> dict[str, Any]:
    digest, share = planned
    parts = archives.pack(site, share, target, part_bytes, spend)
    return {
        "digest": digest,
        "files": len(share),
        "parts": [part._asdict() for part in parts],
    }


def _known(out: Path) -> dict[str, dict[str, Any]]:
    """Return what earlier runs wrote here, by the digest of what went in."""
    found: dict[str, dict[str, Any]] = {}
    for name in (archives.MANIFEST, ".progress.json"):
        try:
            told = json.loads((out / name).read_text())
            found |= {record["digest"]: record for record in told["archives"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or one that was cut off: everything is made anew
    return found


def _whole(out: Path, parts: Sequence[dict[str, Any]]) -> bool:
    try:
        archives.verify(out, [Part(**part) for part in parts])
    except ArchiveError:
        return False
    return True


def _sweep(out: Path, kept: set[str]) -> None:
    """Remove archives of other runs, and beginnings."""
    (out / archives.MANIFEST).unlink(missing_ok=True)
    for path in {*out.glob("*.tar.xz*"), *out.glob(".*.new")}:
        if path.name not in kept:
            path.unlink()


def _digest(texts: Any) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _write(path: Path, value: object) -> None:
    """Replace a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
