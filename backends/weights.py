"""Which files a start reads: those of a model, as engines choose among formats, and of caches.

Looks at folders and indexes, and reads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.engines.files import caches_read, models_read
from backends.spec import ReplicaSpec

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")  # the first kind that is there
_WEIGHT_SUFFIXES = frozenset(Path(pattern).suffix for pattern in _WEIGHTS)
_SMALL_BYTES_MAX = 64 * 1024 * 1024  # tokenizers, configurations
_CACHE_BYTES_MAX = 8 * 1024 * 1024 * 1024  # a cache that was never cleaned is not all of use


def files_read(spec: ReplicaSpec, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield what an engine with this specification and environment reads while it starts.

    The caches come first: they are small.
    """
    for folder in caches_read(spec, environ):
        yield from cache_files(Path(folder))
    for name in models_read(spec):
        found = model_folder(name, environ)
        if found is not None:
            yield from model_files(found)


def model_files(folder: Path) -> Iterator[Path]:
    """Yield the files that loading a model reads, weights last and in the order of their names.

    Weights come in several formats, side by side at times; an index says which an engine takes.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            small = path.is_file() and path.stat().st_size <= _SMALL_BYTES_MAX
            if small and path.suffix not in _WEIGHT_SUFFIXES:
                yield path
    index = _indexed(folder / "model.safetensors.index.json")
    if index:
        yield from (folder / name for name in index)
        return
    for pattern in _WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            split = [path for path in found if not path.name.startswith("consolidated")]
            yield from split or found
            return


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


def _indexed(path: Path) -> list[str]:
    try:
        return sorted(set(msgspec.json.decode(path.read_bytes(), type=_Index).weight_map.values()))
    except (OSError, msgspec.MsgspecError):
        return []


def cache_files(folder: Path) -> Iterator[Path]:
    """Yield what lies under a folder of compiled things, bounded."""
    budget_bytes = _CACHE_BYTES_MAX
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            with suppress(OSError):
                budget_bytes -= path.stat().st_size
                if budget_bytes < 0:
                    return
                yield path


def model_folder(name: str, environ: Mapping[str, str]) -> Path | None:
    """Return where a model lies: a folder, or the snapshot of a hub id in the local cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    repository = _hub_cache(environ) / f"models--{name.replace('/', '--')}"
    with suppress(OSError):
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
        return snapshot if snapshot.is_dir() else None
    return None


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the cache as huggingface_hub finds it (`constants.py`)."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environ.get(variable):
            return Path(folder)
    general = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "/"), ".cache")
    home = environ.get("HF_HOME") or os.path.join(general, "huggingface")
    return Path(home) / "hub"
