"""A folder as archives of bounded size, and back again. Standard library only.

Files are sorted into a few archives by size, so that a host unpacks them side by side. Each is a
tar stream (pax; a file that is mostly zeros is stored without them, in the sparse form that GNU tar
reads, too) through xz, cut into parts where it is longer than a part may be. The same files give
the same octets. Nothing is unpacked before its digest was found right.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

FORMAT = 1
MANIFEST = "manifest.json"
CRIU = "criu.txz"  # beside the archives of any bundle
_BLOCK = 1 << 16  # grain of holes
_ZEROS = bytes(_BLOCK)
_HOLES_BYTES_MIN = 1 << 20  # below this a sparse file is not worth its map
_ARCHIVE_BYTES = 48 << 20  # of content; smaller ones compress worse, larger ones unpack one by one
_ARCHIVES_MAX = 8
_WINDOW_BYTES_MIN, _WINDOW_BYTES_MAX = 1 << 20, 64 << 20
_EPOCH_S = 315532800  # 1980-01-01, the oldest time that a wheel can tell


class ArchiveError(Exception):
    """One line: what is wrong and what to do."""


class Member(NamedTuple):
    """One file of an archive."""

    name: str
    size_bytes: int
    content_bytes: int  # without its holes
    executable: bool
    sha256: str


class Part(NamedTuple):
    """One file of the result."""

    file: str
    bytes: int
    sha256: str


def file_digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# --- making ---------------------------------------------------------------------------------------


def list_members(root: Path) -> list[Member]:
    """Return the files below `root` by name; its links are not followed, wheels have none."""
    found = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in files:
            path = Path(folder, file)
            status = path.stat()
            found.append(
                Member(
                    path.relative_to(root).as_posix(),
                    status.st_size,
                    min(status.st_size, status.st_blocks * 512),
                    bool(status.st_mode & 0o100),
                    file_digest(path),
                )
            )
    return sorted(found)


def share_out(members: Sequence[Member]) -> list[list[Member]]:
    """Return the members of each archive: about equal work, libraries apart from text.

    Libraries go through a filter for machine code. Members are kept beside those of their folder,
    for what compresses well together.
    """
    libraries = [m for m in members if _is_library(m)]
    text = [m for m in members if not _is_library(m)]
    return [*_bins(libraries, by_folder=False), *_bins(text, by_folder=True)]


def _is_library(member: Member) -> bool:
    return ".so" in Path(member.name).suffixes


def _bins(members: Sequence[Member], *, by_folder: bool) -> list[list[Member]]:
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.name.split("/")[0] if by_folder else member.name, []).append(
            member
        )
    sizes = {key: sum(m.content_bytes for m in group) for key, group in groups.items()}
    count = min(_ARCHIVES_MAX, -(-sum(sizes.values()) // _ARCHIVE_BYTES), len(groups))
    bins: list[list[Member]] = [[] for _ in range(count)]
    loads = [0] * count
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[key]
        bins[lightest] += groups[key]
    return [sorted(held) for held in bins]


def _no_limit(size_bytes: int) -> None:
    """Let it be written."""


def pack(
    root: Path,
    members: Sequence[Member],
    target: Path,
    part_bytes: int,
    spend: Callable[[int], None] = _no_limit,
) -> list[Part]:
    """Write `members` to `target` (NAME.tar.xz), or to NAME.tar.xz.01, .02, … when it is long.

    The files appear under their names only when all of them are whole. `spend` hears of each piece
    that is written; what it raises ends the work.
    """
    # What is smaller than the window of the strongest preset needs none so large.
    content_bytes = sum(member.content_bytes for member in members)
    window_bytes = min(_WINDOW_BYTES_MAX, max(_WINDOW_BYTES_MIN, content_bytes))
    filters: list[dict[str, Any]] = [
        {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window_bytes}
    ]
    if members and all(_is_library(member) for member in members):
        filters.insert(0, {"id": lzma.FILTER_X86})
    writer = _Parts(target, part_bytes, spend)
    try:
        with (
            lzma.open(cast("IO[bytes]", writer), "wb", filters=filters) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for member in members:
                _add(archive, root / member.name, member)
    except BaseException:
        writer.abandon()
        raise
    return writer.finish()


class _Parts:
    """A file that goes on in the next one when it is full."""

    def __init__(self, target: Path, part_bytes: int, spend: Callable[[int], None]) -> None:
        self._target = target
        self._part_bytes = part_bytes
        self._spend = spend
        self._left = 0
        self._sink: IO[bytes] | None = None
        self._written: list[Path] = []
        self._parts: list[tuple[int, Any]] = []

    def write(self, data: Any) -> int:
        view = memoryview(data)
        done = 0
        while done < len(view):
            if self._left == 0:
                self._next()
            piece = view[done : done + self._left]
            assert self._sink is not None
            self._spend(len(piece))
            self._sink.write(piece)
            size, digest = self._parts[-1]
            digest.update(piece)
            self._parts[-1] = (size + len(piece), digest)
            self._left -= len(piece)
            done += len(piece)
        return done

    def _next(self) -> None:
        if self._sink is not None:
            self._sink.close()
        path = self._target.with_name(f".{self._target.name}.{len(self._written) + 1:02}.new")
        self._sink = path.open("wb")
        self._written.append(path)
        self._parts.append((0, hashlib.sha256()))
        self._left = self._part_bytes

    def abandon(self) -> None:
        """Leave nothing of it."""
        if self._sink is not None:
            self._sink.close()
        for path in self._written:
            path.unlink(missing_ok=True)

    def finish(self) -> list[Part]:
        """Give the files their names and return them."""
        if self._sink is not None:
            self._sink.close()
        found = []
        alone = len(self._written) == 1
        for index, (path, (size, digest)) in enumerate(
            zip(self._written, self._parts, strict=True), 1
        ):
            name = self._target.name if alone else f"{self._target.name}.{index:02}"
            path.replace(self._target.with_name(name))
            found.append(Part(name, size, digest.hexdigest()))
        return found


def _add(archive: tarfile.TarFile, path: Path, member: Member) -> None:
    entry = tarfile.TarInfo(member.name)
    entry.mode = 0o755 if member.executable else 0o644
    entry.mtime = _EPOCH_S
    entry.size = member.size_bytes
    ranges = data_ranges(path, member.size_bytes)
    content = sum(size for _, size in ranges)
    if member.size_bytes - content < _HOLES_BYTES_MIN:
        with path.open("rb") as source:
            archive.addfile(entry, source)
        return
    # GNU's sparse form 1.0 in pax (GNU tar manual, "PAX Format, Version 1.0"): a map, then the data
    if ranges and sum(ranges[-1]) < member.size_bytes:
        ranges.append((member.size_bytes, 0))  # so that the hole at the end is made, too
    numbers = [len(ranges), *(number for pair in ranges for number in pair)]
    table = "".join(f"{number}\n" for number in numbers).encode()
    table += bytes(-len(table) % tarfile.BLOCKSIZE)
    folder, _, name = member.name.rpartition("/")
    entry.name = f"{folder}/GNUSparseFile.0/{name}" if folder else f"GNUSparseFile.0/{name}"
    entry.size = len(table) + content
    entry.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": member.name,
        "GNU.sparse.realsize": str(member.size_bytes),
    }
    with path.open("rb") as source:
        archive.addfile(entry, cast("IO[bytes]", _Chain(_sparse_reads(table, source, ranges))))


def data_ranges(path: Path, size_bytes: int) -> list[tuple[int, int]]:
    """Return (start, size) of what of a file is not zeros, in grains; by its octets, not by the
    holes of this file system, so that the archive is the same everywhere."""
    ranges: list[tuple[int, int]] = []
    if size_bytes < _HOLES_BYTES_MIN:
        return [(0, size_bytes)]
    with path.open("rb") as source:
        at = 0
        while block := source.read(_BLOCK):
            if block != _ZEROS[: len(block)]:
                if ranges and sum(ranges[-1]) == at:
                    ranges[-1] = (ranges[-1][0], ranges[-1][1] + len(block))
                else:
                    ranges.append((at, len(block)))
            at += len(block)
    return ranges


def _sparse_reads(
    table: bytes, source: IO[bytes], ranges: Iterable[tuple[int, int]]
) -> Iterator[bytes]:
    yield table
    for start, size in ranges:
        source.seek(start)
        for at in range(start, start + size, _BLOCK):
            yield source.read(min(_BLOCK, start + size - at))


class _Chain:
    """What an iterator of pieces yields, as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        taken = [self._rest]
        held = len(self._rest)
        while size < 0 or held < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            taken.append(piece)
            held += len(piece)
        everything = b"".join(taken)
        end = len(everything) if size < 0 else size
        self._rest = everything[end:]
        return everything[:end]


# --- reading --------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a folder of archives holds."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArchiveError(
            f"{folder} has no {MANIFEST}; name a folder that bundle.py finished"
        ) from None
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArchiveError(f"{path} is of another form; take unpack.py of the same checkout")
    return manifest


def verify(folder: Path, parts: Iterable[Part]) -> None:
    """Find every part whole. Raises `ArchiveError` naming the first that is not."""
    for part in parts:
        path = folder / part.file
        try:
            size = path.stat().st_size
            digest = file_digest(path)
        except OSError:
            raise ArchiveError(f"{path} is missing; copy it again") from None
        if size != part.bytes:
            raise ArchiveError(f"{path} has {size} bytes, not {part.bytes}; copy it again")
        if digest != part.sha256:
            raise ArchiveError(f"{path} is not what was packed (sha256 differs); copy it again")


def unpack(folder: Path, parts: Sequence[Part], target: Path) -> int:
    """Write what verified parts hold below `target`; return how many files that was."""
    verify(folder, parts)
    stream = cast("IO[bytes]", _Chain(_read_parts([folder / part.file for part in parts])))
    count = 0
    with (
        lzma.open(stream, "rb") as plain,
        tarfile.open(fileobj=plain, mode="r|") as archive,
    ):
        for entry in archive:
            # Archives are unpacked side by side and share folders; tarfile makes a missing one as
            # if it were alone, and fails where another was quicker.
            named = tarfile.data_filter(entry, str(target)).name
            (target / named).parent.mkdir(parents=True, exist_ok=True)
            archive.extract(entry, target, set_attrs=True, filter="data")
            count += 1
    return count


def _read_parts(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as source:
            while piece := source.read(1 << 20):
                yield piece
