"""The file of keys: one writer at a time, never half, and nobody else's."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from backends.keys.changes import added
from backends.keys.file import change, load
from proxy.contract.key_file import KeyFile, KeyFileError, parse_key_file, read_key_file
from proxy.contract.keys import KeyRecord, KeySet

ROOT = Path(__file__).parents[3]
SALT = "s" * 16


def record(number: int) -> KeyRecord:
    return KeyRecord(key_id=f"k{number}", tenant="t", digest=f"{number:064x}")


def add(path: Path, number: int) -> KeySet:
    return change(str(path), lambda keys: added(keys, record(number)))


def test_a_new_file_is_for_its_owner_alone_and_has_a_salt_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = add(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = add(path, 2)
    assert read_key_file(str(path)) == second
    assert (second.version, len(second.keys), second.salt) == (2, 2, first.salt)
    assert len(first.salt) >= 16
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_a_change_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        change(str(path), lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    twice = (record(1), msgspec.structs.replace(record(2), key_id="k1"))
    with pytest.raises(KeyFileError, match="the key_id 'k1' is there 2 times"):
        change(str(path), lambda keys: msgspec.structs.replace(keys, keys=twice))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_link_points_to_is_changed_and_the_group_may_go_on_reading(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "keys.json", tmp_path / "keys.json"
    add(path, 1)
    path.chmod(0o640)
    link.symlink_to(path)
    add(link, 2)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(load(str(path)).keys) == 2


def test_several_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    code = (
        "import sys; from tests.backends.keys.test_file import add; from pathlib import Path\n"
        "for n in range(5): add(Path(sys.argv[1]), int(sys.argv[2]) * 10 + n)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(n)], cwd=ROOT)
        for n in range(3)
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    keys = read_key_file(str(path))
    assert (len(keys.keys), keys.version) == (15, 15)


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o644, 0o602, 0o666])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}.*chmod 600 {path}"):
        read_key_file(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no file of keys"),
        (b"[]", "no file of keys"),
        (b'{"salt":"%s","key":[]}' % SALT.encode(), "unknown field `key`"),
        (b'{"salt":"short"}', "salt needs 16 characters"),
        (
            b'{"salt":"%s","keys":[{"key_id":"a","tenant":"t","digest":"%s","expire_at":1}]}'
            % (SALT.encode(), b"0" * 64),
            "unknown field `expire_at`",
        ),
        (
            b'{"salt":"%s","keys":[{"key_id":"a","tenant":"t","digest":"XY"}]}' % SALT.encode(),
            "digest",
        ),
        (
            b'{"salt":"%s","keys":[%s]}'
            % (
                SALT.encode(),
                b",".join(
                    b'{"key_id":"%s","tenant":"t","digest":"%s"}' % (n, b"0" * 64)
                    for n in (b"a", b"b")
                ),
            ),
            "the digest beginning with 00000000 is there 2 times",
        ),
        (
            b'{"salt":"%s","keys":[{"key_id":"a","tenant":"\xff","digest":"%s"}]}'
            % (SALT.encode(), b"0" * 64),
            "can't decode byte 0xff",
        ),
    ],
)
def test_what_is_no_file_of_keys_is_refused(content: bytes, words: str) -> None:
    with pytest.raises(KeyFileError, match=re.escape(words)):
        parse_key_file(content, "keys.json")


def test_keys_can_be_made_before_their_folder_is_there(tmp_path: Path) -> None:
    path = tmp_path / ".doherty" / "keys.json"
    change(str(path), lambda keys: keys)
    assert read_key_file(str(path)).keys == ()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read: No such file"):
        read_key_file(str(tmp_path / "none"))
    with pytest.raises(KeyFileError, match="cannot be written: No such file"):
        change(str(tmp_path / "no" / "folder" / "keys.json"), lambda keys: keys)
    os.mkfifo(tmp_path / "pipe")  # nobody writes: who waited for that would wait for ever
    with pytest.raises(KeyFileError, match="it is no file"):
        read_key_file(str(tmp_path / "pipe"))


def test_a_file_is_read_again_when_anything_of_it_changes_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, 1)
    file = KeyFile(str(path))
    assert file.look() is not None
    assert file.look() is None
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="mode 0644"):
        file.look()
    assert file.look() is None, "a fault is told once"
    path.chmod(0o600)
    assert file.look() is not None
    add(path, 2)
    seen = file.look()
    assert seen is not None
    assert len(seen.keys) == 2
    path.unlink()
    with pytest.raises(KeyFileError, match="No such file"):
        file.look()
    assert not file.missing, "it was there"


def test_what_cannot_be_read_for_a_moment_is_told_once_and_read_as_soon_as_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing about a file changes when descriptors were short as a key in it was revoked."""
    path = tmp_path / "keys.json"
    add(path, 1)
    file = KeyFile(str(path))
    assert file.look() is not None
    changed = add(path, 2)

    def none_left(*_: object, **__: object) -> object:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as short:
        short.setattr("builtins.open", none_left)
        with pytest.raises(KeyFileError, match="Too many open files"):
            file.look()
        assert [file.look() for _ in range(3)] == [None] * 3
    assert file.look() == changed
    assert file.look() is None


def test_a_mounted_secret_that_is_swapped_by_its_link_is_read_anew(tmp_path: Path) -> None:
    """As Kubernetes does it: the file is a link through a folder that is a link."""
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        add(tmp_path / f"v{number}" / "keys.json", number)
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "keys.json").symlink_to("data/keys.json")
    file = KeyFile(str(tmp_path / "keys.json"))
    first = file.look()
    (tmp_path / "new").symlink_to("v2")
    os.replace(tmp_path / "new", tmp_path / "data")
    second = file.look()
    assert first is not None
    assert second is not None
    assert [set_.keys[0].key_id for set_ in (first, second)] == ["k1", "k2"]


def test_where_there_is_no_file_yet_there_are_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile(str(path))
    none = file.look()
    assert none is not None
    assert file.missing
    assert (none.keys, len(none.salt) >= 16) == ((), True)
    assert file.look() is None
    add(path, 1)
    assert file.look() is not None
    assert not file.missing
