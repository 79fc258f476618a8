"""What is written beside an image: what it is of, how it comes back, and what it consists of.

The manifest is written last and the folder renamed into place after it, so a folder under its
final name is whole as far as its writer knew. It has a hash of itself, because a damaged key would
make an image fit what it does not fit.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import xxhash

from backends.snapshots.base import Snapshot, SnapshotKey

FORMAT = 1
NAME = "manifest.json"


class File(msgspec.Struct, frozen=True):
    """One file of an image; `hashes` are those of its pieces, see `whole`."""

    name: str
    bytes: int
    hashes: tuple[str, ...]


class CellFacts(msgspec.Struct, frozen=True):
    """What the cell that restores it must know."""

    engine: int  # its pid inside
    outputs: tuple[str, ...]  # where it wrote, as CRIU names it: re-attached to the new log


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    snapshot_id: str
    key: SnapshotKey
    made_at_s: float
    dump_s: float
    port: int
    suspended: bool
    nap_level: int
    devices: tuple[str, ...] = ()
    criu_version: str
    cell: CellFacts
    files: tuple[File, ...]
    seal: str = ""  # of all the rest

    @property
    def image_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def snapshot(self, folder: Path) -> Snapshot:
        """Return what keepers know of it."""
        return Snapshot(
            snapshot_id=self.snapshot_id,
            key=self.key,
            folder=folder,
            image_bytes=self.image_bytes,
            made_at_s=self.made_at_s,
            dump_s=self.dump_s,
            port=self.port,
            suspended=self.suspended,
            nap_level=self.nap_level,
            devices=self.devices,
        )


def with_files(manifest: Manifest, files: tuple[File, ...]) -> Manifest:
    """Return it with what the image consists of."""
    return msgspec.structs.replace(manifest, files=files)


def sealed(manifest: Manifest) -> bytes:
    """Return the file's content."""
    return msgspec.json.encode(msgspec.structs.replace(manifest, seal=_seal(manifest)))


def read(data: bytes) -> Manifest:
    """Return what a file says. Raises `ValueError`, with what is wrong."""
    manifest = msgspec.json.decode(data, type=Manifest)
    if manifest.format != FORMAT:
        raise ValueError(f"format {manifest.format} is of another release")
    if manifest.seal != _seal(manifest):
        raise ValueError("it is not what was written")
    return manifest


def difference(made: SnapshotKey, wanted: SnapshotKey) -> str:
    """Return why an image of `made` does not do for `wanted`, "" when it does."""
    for name in SnapshotKey.__struct_fields__:
        old, new = getattr(made, name), getattr(wanted, name)
        if old != new:
            shown = f"{old or 'none'}, now {new or 'none'}"
            return f"{name}: changed" if name == "launch_hash" else f"{name}: {shown}"
    return ""


def _seal(manifest: Manifest) -> str:
    rest = msgspec.structs.replace(manifest, seal="")
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(rest))
