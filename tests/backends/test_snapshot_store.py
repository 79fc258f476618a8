"""Images on disk: what is found, what is refused, what is damaged, and what goes first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.snapshots import manifest, whole
from backends.snapshots.base import SnapshotError, SnapshotKey
from backends.snapshots.store import MARKED_MAX, Held, Store, doomed, secure

KEY = SnapshotKey(
    pool="a", model="m", engine="vllm", engine_version="0.33.0", launch_hash="1", gpu="H200"
)


def made(name: str, at_s: float = 1.0, key: SnapshotKey = KEY, **more: object) -> manifest.Manifest:
    base = manifest.Manifest(
        format=manifest.FORMAT,
        snapshot_id=name,
        key=key,
        made_at_s=at_s,
        dump_s=1.0,
        port=8000,
        suspended=False,
        nap_level=0,
        criu_version="4.2.1",
        cell=manifest.CellFacts(1000, ()),
        files=(),
    )
    return msgspec.structs.replace(base, **more)


def publish(store: Store, name: str, at_s: float = 1.0, key: SnapshotKey = KEY) -> Path:
    """Make an image of two files, one of them of two pieces."""
    store.open()
    folder, lock = store.begin(name)
    (folder / "core.img").write_bytes(b"core")
    with (folder / "pages.img").open("wb") as pages:
        pages.truncate(whole.PIECE_BYTES + 5)
    secure(folder)
    paths = sorted(folder.iterdir())
    hashes = whole.hash_files(paths)
    files = tuple(
        manifest.File(path.name, path.stat().st_size, tuple(hashes[path.name])) for path in paths
    )
    final = store.publish(folder, made(name, at_s, key, files=files))
    os.close(lock)
    return final


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "PIECE_BYTES", 1024 * 1024)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


def test_the_newest_that_fits_is_found(store: Store) -> None:
    publish(store, "old", 1.0)
    newest = publish(store, "new", 2.0)
    found = store.find(KEY)
    assert found is not None
    assert (found.snapshot_id, found.folder, found.port) == ("new", newest, 8000)
    assert found.image_bytes == 4 + whole.PIECE_BYTES + 5


@pytest.mark.parametrize("field", [f for f in SnapshotKey.__struct_fields__ if f != "pool"])
def test_an_image_of_anything_else_is_stale_and_told_of_once(tmp_path: Path, field: str) -> None:
    told: list[str] = []
    store = Store(tmp_path / "images", lambda event, **_: told.append(event))
    publish(store, "one", 1.0, msgspec.structs.replace(KEY, **{field: "other"}))
    assert store.find(KEY) is None
    assert store.find(KEY) is None
    assert told == ["snapshot_stale"]


def test_a_flipped_bit_anywhere_is_found(store: Store) -> None:
    folder = publish(store, "one")
    for name, position in (("core.img", 0), ("pages.img", whole.PIECE_BYTES + 4)):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert name in whole.first_problem(folder)
        path.write_bytes(good)
        assert whole.first_problem(folder) == ""


def test_a_shorter_file_and_a_missing_one_are_never_found(store: Store) -> None:
    folder = publish(store, "one")
    os.truncate(folder / "pages.img", 7)
    assert store.find(KEY) is None
    (folder / "pages.img").unlink()
    assert store.find(KEY) is None
    assert "pages.img" in store.look("one").problem


def test_a_name_that_no_image_has_is_told_as_such(store: Store) -> None:
    publish(store, "one")
    assert store.verify("two") == f"there is no such image in {store.folder}"
    assert [held.name for held in store.held()] == ["one"]


def test_what_was_found_damaged_once_stays_so(store: Store) -> None:
    folder = publish(store, "one")
    (folder / "core.img").write_bytes(b"care")
    assert store.find(KEY) is not None  # sizes say nothing
    assert "core.img" in store.verify("one")
    assert store.find(KEY) is None
    problem = "core.img is not what was written, in the 1 MiB from byte 0 on"
    assert store.prune() == {"one": problem}
    assert store.held() == []


def test_what_failed_once_is_never_found_again_and_the_one_before_it_is(store: Store) -> None:
    publish(store, "old", 1.0)
    new = publish(store, "new", 2.0)
    store.mark("new", "a copy of it ended")
    store.mark("new", "another one, too")
    later = Store(store.folder)
    for one in (store, later):
        found = one.find(KEY)
        assert found is not None
        assert found.snapshot_id == "old"
    assert later.look("new").problem == "a copy of it ended"
    os.truncate(new / "damaged", 0)  # what a loss of power may leave
    assert Store(store.folder).look("new").problem
    assert "new" in later.prune()


def test_a_mark_that_the_disk_does_not_take_is_kept_in_memory(store: Store) -> None:
    folder = publish(store, "one")
    (folder / "damaged.new").mkdir()
    store.mark("one", "bad")
    assert store.find(KEY) is None
    for number in range(MARKED_MAX):
        store.mark(str(number), "bad")
    assert store.find(KEY) is not None, "the oldest mark has gone"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data.replace(b"H200", b"H100"), lambda _: b""]
)
def test_a_damaged_manifest_fits_nothing(store: Store, damage: object) -> None:
    path = publish(store, "one") / manifest.NAME
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    other = msgspec.structs.replace(KEY, gpu="H100")
    assert store.find(KEY) is None
    assert store.find(other) is None


def test_a_manifest_of_another_format_is_refused(store: Store) -> None:
    path = publish(store, "one") / manifest.NAME
    path.write_bytes(manifest.sealed(made("one", format=2)))
    assert "another release" in store.look("one").problem


def test_nobody_else_may_look_into_the_folder(store: Store) -> None:
    folder = publish(store, "one")
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    store.folder.chmod(0o755)
    with pytest.raises(SnapshotError, match="open to others"):
        store.open()
    assert store.folder.stat().st_mode & 0o777 == 0o755  # refused, not repaired


def test_one_in_use_and_one_being_written_stay(store: Store) -> None:
    used = publish(store, "used", 1.0)
    publish(store, "free", 2.0)
    lock = whole.use(used)
    folder, writing = store.begin("unfinished")
    assert store.prune(bytes_max=1) == {"free": "room is wanted"}
    assert used.exists()
    assert folder.exists()
    os.close(lock)
    os.close(writing)
    removed = store.prune(bytes_max=1)
    assert set(removed) == {"used", ".new-unfinished"}
    assert list(store.folder.iterdir()) == []


def _held(name: str, at_s: float, key: SnapshotKey, size: int) -> Held:
    return Held(name, made(name, at_s, key, files=(manifest.File("f", size, ()),)))


def test_stale_ones_go_before_old_ones() -> None:
    stale = msgspec.structs.replace(KEY, engine_version="0.32.0")
    other = msgspec.structs.replace(KEY, pool="b")
    held = [_held("s", 9.0, stale, 10), _held("n", 3.0, KEY, 10), _held("b", 2.0, other, 10)]
    assert doomed(held, {"a": KEY}, 20, 2) == {"s": "stale, and room is wanted"}
    assert set(doomed(held, {"a": KEY}, 10, 2)) == {"s", "b"}
    assert doomed(held, {"a": KEY}, 0, 2) == {}


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), max_size=12),
    st.integers(1, 100),
    st.integers(1, 3),
)
def test_what_stays_is_within_the_bounds(
    images: list[tuple[str, int]], bytes_max: int, kept: int
) -> None:
    held = [
        _held(str(n), -float(n), msgspec.structs.replace(KEY, pool=pool), size)
        for n, (pool, size) in enumerate(images)
    ]
    gone = doomed(held, {}, bytes_max, kept)
    stays = [one for one in held if one.name not in gone]
    assert sum(one.manifest.image_bytes for one in stays if one.manifest) <= bytes_max
    for pool in "ab":
        assert sum(1 for one in stays if one.manifest and one.manifest.key.pool == pool) <= kept
    # Nothing goes that need not: the newest of those that went for want of room would not fit.
    wanting = [one for one in held if gone.get(one.name, "").endswith("room is wanted")]
    if wanting:
        newest = max(wanting, key=lambda one: one.manifest.made_at_s if one.manifest else 0.0)
        assert newest.manifest is not None
        total = sum(one.manifest.image_bytes for one in stays if one.manifest)
        assert total + newest.manifest.image_bytes > bytes_max


def test_a_manifest_says_what_it_was_told() -> None:
    one = made("one", nap_level=2, suspended=True)
    read = manifest.read(manifest.sealed(one))
    assert msgspec.structs.replace(read, seal="") == one
    assert json.loads(manifest.sealed(one))["cell"]["engine"] == 1000
