"""Keeps the weights of a vLLM worker in a file, and fills its memory from there: `Weights` is an
extension of the worker (`--worker-extension-cls`), whose methods `/collective_rpc` calls.

Sleep level 2 throws the weights away, and vLLM's own way back reads the checkpoint tensor by tensor
through its loaders. What was in memory is known here, octet by octet, so it is copied as it was:
from the page cache by several threads at once, each through a pinned buffer of its own, which the
card takes at the speed of its link. What the file is of is in its name and head: engine and flags,
checkpoint files, card, which worker of how many this is, and the very regions of memory. All of it
matters: two workers of one model have other parts of it at the same addresses, and a flag can have
the same part lie there in another order. Where anything differs, or there is no file, vLLM reloads.

The file is as secret as the checkpoint, and more readable: nobody else may read it. A few are kept.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

THREADS = 8
CHUNK_BYTES = 8 * 1024 * 1024  # small, so that what stays pinned is no part of an image
FILES_MAX = 4
FOLDER_VARIABLE = "DOHERTY_WEIGHTS"
FORM_VARIABLE = "DOHERTY_WEIGHTS_FORM"  # names all that the engine was told
UNFINISHED_S_MAX = 3600.0  # nobody writes that long
_HEAD_BYTES = 1 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")

Region = tuple[int, int]  # address and size


class NotHereError(Exception):
    """There is no file that fits; the text says why."""


class Link(Protocol):
    """Moves octets between the card and the host."""

    def begin(self) -> None:
        """Make the calling thread one that may copy."""

    def buffer(self, size: int) -> tuple[int, memoryview]:
        """Return memory that the card reaches quickly: its address, and a view of it."""

    def copy(self, target: int, source: int, size: int) -> None: ...

    def end(self) -> None:
        """Give the buffers back."""


class Weights:
    """What a worker can do beside what it can."""

    def doherty_keep(self) -> dict[str, Any]:
        """Write the weights to a file that is not there yet; never fails."""
        begun_s = time.monotonic()
        try:
            regions, path = _regions(), _path_of(self)
            if _head_of(path) == _head(regions):
                return {"kept": True, "took_s": 0.0}
            keep(path, regions, CudaLink())
        except Exception as error:  # noqa: BLE001  # without a file vLLM reloads
            return {"kept": False, "reason": f"{type(error).__name__}: {error}"}
        return {"kept": True, "took_s": round(time.monotonic() - begun_s, 3)}

    def doherty_fill(self) -> dict[str, Any]:
        """Put the weights back, where there is memory for them; else have vLLM reload them."""
        begun_s = time.monotonic()
        reason = ""
        try:
            fill(_path_of(self), _regions(), CudaLink())
        except Exception as error:  # noqa: BLE001  # whatever it is, the other way is right, too
            reason = f"{type(error).__name__}: {error}"
            self.reload_weights()  # type: ignore[attr-defined]  # of the worker
        took_s = round(time.monotonic() - begun_s, 3)
        how = f", by reloading: {reason}" if reason else ""
        sys.stderr.write(f"doherty: weights filled in {took_s} s{how}\n")
        return {"filled": not reason, "reason": reason, "took_s": took_s}


# --- files ------------------------------------------------------------------------------------


def keep(path: str, regions: Sequence[Region], link: Link) -> None:
    """Write what lies in `regions`, whole or not at all. Raises `OSError`."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # A name of its own, which a pid is not: in two cells they are the same.
    fd, new = tempfile.mkstemp(".new", os.path.basename(path), folder)
    try:
        os.pwrite(fd, _head(regions), 0)
        os.posix_fallocate(fd, 0, _HEAD_BYTES + sum(size for _, size in regions))

        def write(at: int, address: int, size: int, buffer: tuple[int, memoryview]) -> None:
            link.copy(buffer[0], address, size)
            _whole(os.pwritev(fd, [buffer[1][:size]], at), size, path)

        _in_threads(write, regions, link)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
    finally:
        os.close(fd)
    _forget(folder)


def fill(path: str, regions: Sequence[Region], link: Link) -> None:
    """Put back what was kept of `regions`. Raises `NotHereError`, `OSError`."""
    if _head_of(path) != _head(regions):
        raise NotHereError(f"{path} is not there, or of other memory")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def read(at: int, address: int, size: int, buffer: tuple[int, memoryview]) -> None:
            _whole(os.preadv(fd, [buffer[1][:size]], at), size, path)
            link.copy(address, buffer[0], size)

        _in_threads(read, regions, link)
        os.utime(path)  # so that what is used is not forgotten
    finally:
        os.close(fd)


def _in_threads(
    work: Callable[[int, int, int, tuple[int, memoryview]], None],
    regions: Sequence[Region],
    link: Link,
) -> None:
    """Do `work` for every chunk. Raises what it raised first."""
    chunks, lock, failed = _chunks(regions), threading.Lock(), list[BaseException]()

    def run() -> None:
        try:
            link.begin()
            buffer = link.buffer(CHUNK_BYTES)
            while not failed:
                with lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                work(*chunk, buffer)
        except BaseException as error:  # noqa: BLE001  # raised where the threads are waited for
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    link.end()
    if failed:
        raise failed[0]


def _whole(done: int, size: int, path: str) -> None:
    if done != size:
        raise OSError(f"{path} ends too soon")


def _chunks(regions: Sequence[Region]) -> Iterator[tuple[int, int, int]]:
    """Yield place in the file, address and size."""
    at = _HEAD_BYTES
    for address, size in regions:
        for start in range(0, size, CHUNK_BYTES):
            yield at + start, address + start, min(CHUNK_BYTES, size - start)
        at += size


def _head(regions: Sequence[Region]) -> bytes:
    text = json.dumps({"form": 1, "regions": regions}).encode()
    if len(text) > _HEAD_BYTES:
        raise NotHereError(f"{len(regions)} regions are more than a file's head can tell")
    return text.ljust(_HEAD_BYTES)


def _head_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""


def _forget(folder: str) -> None:
    """Remove what has not been used for longest, and what nobody finished."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.new")):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(path) > UNFINISHED_S_MAX:
                os.unlink(path)
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.weights")), key=os.path.getmtime)
    for path in paths[:-FILES_MAX]:
        with contextlib.suppress(OSError):
            os.unlink(path)


# --- vLLM -------------------------------------------------------------------------------------


def _regions() -> list[Region]:
    """Return the memory that sleep level 2 throws away and that held weights."""
    allocator = importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator
    known = allocator.get_instance().pointer_to_data.items()
    found = [(int(address), int(data.handle[1])) for address, data in known
             if data.tag == "weights"]  # fmt: skip
    if not found:
        raise NotHereError("vLLM's allocator knows no weights")
    return found


def _path_of(worker: Any) -> str:
    """Return where the weights of this worker's model are kept. Raises `NotHereError`."""
    release = importlib.import_module("vllm").__version__
    config = worker.model_config
    files = [name for kind in _WEIGHTS for name in glob.glob(os.path.join(config.model, kind))]
    if not files:
        raise NotHereError(f"{config.model} is no folder of weights")
    stats = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in sorted(files)]
    card = importlib.import_module("torch").cuda.get_device_name()
    which = [worker.rank, worker.parallel_config.data_parallel_rank]
    told = os.environ[FORM_VARIABLE]
    text = json.dumps([release, told, card, which, str(config.dtype), stats])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(cache, "doherty", "weights")
    return os.path.join(folder, hashlib.sha256(text.encode()).hexdigest()[:24] + ".weights")


class CudaLink:
    """By torch's pinned memory and the CUDA runtime that vLLM has loaded."""

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")
        self._runtime = importlib.import_module("vllm.device_allocator.cumem").libcudart
        self._device = self._torch.cuda.current_device()
        self._pinned: list[Any] = []
        self._torch.cuda.synchronize()

    def begin(self) -> None:
        self._torch.cuda.set_device(self._device)

    def buffer(self, size: int) -> tuple[int, memoryview]:
        tensor = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        self._pinned.append(tensor)
        return tensor.data_ptr(), memoryview(tensor.numpy())

    def copy(self, target: int, source: int, size: int) -> None:
        self._runtime.cudaMemcpy(target, source, size)

    def end(self) -> None:
        self._torch.cuda.synchronize()
        self._pinned.clear()
        empty = getattr(self._torch._C, "_host_emptyCache", None)  # noqa: SLF001  # no other way
        if empty is not None:
            empty()
