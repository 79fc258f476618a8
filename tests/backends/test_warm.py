"""The page cache is warmed: real files, real pages, and the kernel's own word for it."""

from __future__ import annotations

import asyncio
import io
import json
import mmap
import os
import threading
from pathlib import Path

import pytest

from backends import warm
from backends.engines.files import caches_read, models_read
from backends.log import Log
from backends.spec import ReplicaSpec
from backends.starting import Start, warm_up
from backends.warm import Warmer, may_ask, resident_bytes, warm_files
from backends.weights import cache_files, files_read, model_files, model_folder

MIB = 1024 * 1024
PLENTY = 1 << 40


def cold_file(path: Path, size: int) -> Path:
    """Write a file and have its pages dropped; skip where the file system keeps them."""
    path.write_bytes(os.urandom(size))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if resident(path) > size // 2:
        pytest.skip("this file system keeps its pages in memory")
    return path


def resident(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return resident_bytes(fd, 0, path.stat().st_size)
    finally:
        os.close(fd)


def spec(engine: str = "vllm", **more: object) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id="m-0",
        model="org/m",
        pool="m",
        engine=engine,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


def test_what_was_on_the_disk_is_in_memory(disk: Path) -> None:
    size = 3 * MIB + 5
    path = cold_file(disk / "w.safetensors", size)
    warmed = warm_files([path], PLENTY, threading.Event())
    assert (warmed.read_bytes, warmed.cached_bytes, warmed.left_bytes) == (size, 0, 0)
    assert resident(path) == size
    again = warm_files([path], PLENTY, threading.Event())
    assert (again.read_bytes, again.cached_bytes) == (0, size), "a look, and no traffic"


def test_only_the_windows_that_are_missing_are_read(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "WINDOW_BYTES", MIB)
    path = cold_file(disk / "w", 4 * MIB)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead on our behalf
    os.pread(fd, MIB, 2 * MIB)
    os.close(fd)
    assert resident(path) == MIB
    warmed = warm_files([path], PLENTY, threading.Event())
    assert warmed.read_bytes + warmed.cached_bytes == 4 * MIB
    assert warmed.cached_bytes >= MIB
    assert resident(path) == 4 * MIB


def test_memory_that_is_short_ends_it(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "WINDOW_BYTES", MIB)
    first, second = (cold_file(disk / name, 2 * MIB) for name in "ab")
    warmed = warm_files([first, second], MIB, threading.Event())
    assert (warmed.read_bytes, warmed.left_bytes) == (MIB, 3 * MIB)
    assert warm_files([second], 0, threading.Event()).left_bytes == 2 * MIB


def test_it_can_be_ended(disk: Path) -> None:
    path = disk / "w"
    path.write_bytes(b"x" * MIB)
    stop = threading.Event()
    stop.set()
    assert warm_files([path], PLENTY, stop).left_bytes == MIB


def test_what_cannot_be_read_is_the_engines_to_tell(disk: Path) -> None:
    warmed = warm_files([disk / "gone", disk], PLENTY, threading.Event())
    assert warmed.read_bytes == warmed.cached_bytes == 0
    (disk / "empty").write_bytes(b"")
    assert warm_files([disk / "empty"], PLENTY, threading.Event()).read_bytes == 0


def test_of_a_strangers_file_the_kernel_is_not_asked(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk / "w"
    path.write_bytes(b"x" * MIB)
    path.chmod(0o444)
    monkeypatch.setattr(os, "geteuid", lambda: 4_242)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not may_ask(path)
    warmed = warm_files([path], PLENTY, threading.Event())
    assert (warmed.read_bytes, warmed.cached_bytes) == (MIB, 0), "read, though it is cached"


def test_the_kernels_answer_counts_pages(disk: Path) -> None:
    path = cold_file(disk / "w", MIB)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 1, 0)
    assert resident_bytes(fd, 0, MIB) == mmap.PAGESIZE
    os.close(fd)


async def test_one_thread_reads_each_thing_once_and_tells(disk: Path) -> None:
    path = cold_file(disk / "w", MIB)
    stream, found = io.StringIO(), []

    def find() -> list[Path]:
        found.append(threading.current_thread().name)
        return [path]

    warmer = Warmer(Log(stream))
    warmer.warm("m", find)
    warmer.warm("m", find)
    await warmer.idle()
    assert len(found) == 1
    assert found[0].startswith("page-cache")
    (line,) = stream.getvalue().splitlines()
    told = json.loads(line)
    assert (told["event"], told["what"], told["read_bytes"]) == ("page_cache_warmed", "m", MIB)
    warmer.warm("m", find)
    await warmer.idle()
    assert len(found) == 2
    assert len(stream.getvalue().splitlines()) == 1, "all cached: nothing to tell"
    await warmer.close()


async def test_a_warmer_that_is_closed_leaves_nothing_running(disk: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def find() -> list[Path]:
        entered.set()
        go_on.wait(20.0)
        return [disk / "w"]

    warmer = Warmer(Log(io.StringIO()))
    warmer.warm("m", find)
    while not entered.is_set():  # a thread sets it
        await asyncio.sleep(0.001)
    go_on.set()
    await warmer.close()


async def test_it_can_be_off(disk: Path) -> None:
    warmer = Warmer(Log(io.StringIO()), enabled=False)
    warmer.warm("m", lambda: pytest.fail("looked"))
    await warmer.idle()
    await warmer.close()


def test_the_index_says_which_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "consolidated.safetensors", "old.bin"):
        (tmp_path / name).write_text("{}")
    for part in (2, 1):
        (tmp_path / f"model-{part}.safetensors").write_text("")
    names = [path.name for path in model_files(tmp_path)]
    assert names == ["config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"]
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in model_files(tmp_path)][-1] == "model-2.safetensors"
    assert "model-1.safetensors" not in [path.name for path in model_files(tmp_path)]


def test_other_formats_of_weights(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_text("")
    assert [p.name for p in model_files(tmp_path)] == ["consolidated.safetensors"]
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "m.gguf").write_text("")
    assert [p.name for p in model_files(tmp_path)] == ["pytorch_model.bin"]
    assert list(model_files(tmp_path / "none")) == []


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--org--m" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for environ in ({"HF_HOME": str(tmp_path)}, {"HF_HUB_CACHE": str(tmp_path / "hub")}):
        assert model_folder("org/m", environ) == snapshot
    general = tmp_path / "huggingface"
    general.symlink_to(tmp_path)
    assert model_folder(
        "org/m", {"XDG_CACHE_HOME": str(tmp_path)}
    ) == general / snapshot.relative_to(tmp_path)
    assert model_folder("org/other", {"HF_HOME": str(tmp_path)}) is None
    (refs / "main").write_text("gone")
    assert model_folder("org/m", {"HF_HOME": str(tmp_path)}) is None
    assert model_folder(str(tmp_path), {}) == tmp_path


MODELS = [
    ("the path", spec(model_path="/w/m"), ("/w/m",)),
    ("the name", spec(), ("org/m",)),
    ("dummy weights", spec(args=("--load-format", "dummy")), ()),
    ("nothing of the simulator", spec("simulator"), ()),
    (
        "draft and adapters",
        spec(
            "sglang",
            args=("--speculative-draft-model-path=/w/draft",),
            adapters={"fr": "/w/fr", "m": "org/m"},
        ),
        ("org/m", "/w/draft", "/w/fr"),
    ),
    (
        "draft in JSON",
        spec(args=("--speculative-config", '{"method":"eagle3","model":"/w/draft","n":3}')),
        ("org/m", "/w/draft"),
    ),
    ("draft in what is no JSON", spec(args=("--speculative-config", "{")), ("org/m",)),
]


@pytest.mark.parametrize(("given", "models"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_which_models_a_start_reads(given: ReplicaSpec, models: tuple[str, ...]) -> None:
    assert models_read(given) == models


def test_which_caches_a_start_reads() -> None:
    environ = {"HOME": "/home/me", "USER": "me", "TRITON_CACHE_DIR": "/fast/triton"}
    assert caches_read(spec("vllm"), environ) == (
        "/home/me/.cache/vllm",
        "/tmp/torchinductor_me",
        "/fast/triton",
        "/home/me/.cache/flashinfer",
        "/home/me/.nv/ComputeCache",
    )
    assert "/home/me/.cache/sglang" in caches_read(spec("sglang"), environ)
    assert caches_read(spec("vllm"), {"VLLM_CACHE_ROOT": "/c"}) == ("/c", "/tmp/torchinductor_root")
    assert caches_read(spec("simulator"), environ) == ()


async def test_a_start_has_its_model_read(disk: Path) -> None:
    path = cold_file(disk / "model.safetensors", MIB)
    warmer = Warmer(Log(io.StringIO()))
    environ = {"VLLM_CACHE_ROOT": str(disk / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(disk / "no")}
    start = Start(("vllm",), environ, 1, {}, None, "", (), "life")
    warm_up(warmer, spec("simulator", model_path=str(disk)), start)
    await warmer.idle()
    assert resident(path) < MIB, "the simulator reads none"
    warm_up(warmer, spec("vllm", model_path=str(disk)), start)
    await warmer.idle()
    assert resident(path) == MIB
    await warmer.close()


def test_caches_come_before_weights(tmp_path: Path) -> None:
    (tmp_path / "cache" / "b").mkdir(parents=True)
    (tmp_path / "cache" / "b" / "kernel").write_text("x")
    (tmp_path / "cache" / "a").write_text("x")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_text("x")
    environ = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": "/nowhere"}
    found = files_read(spec(model_path=str(tmp_path / "m")), environ)
    assert [path.name for path in found] == ["a", "kernel", "model.safetensors"]
    assert list(files_read(spec("simulator"), environ)) == []
    elsewhere = files_read(spec(model_path="not/here"), {**environ, "HF_HOME": str(tmp_path)})
    assert [path.name for path in elsewhere] == ["a", "kernel"]


def test_a_cache_that_was_never_cleaned_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 10)
    monkeypatch.setattr("backends.weights._CACHE_BYTES_MAX", 25)
    assert [path.name for path in cache_files(tmp_path)] == ["a", "b"]
