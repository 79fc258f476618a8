"""Which GPU code is blanked, on libraries that are built here octet by octet."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from deploy.airgap import bundle, fatbin, kinds

_PTX, _ELF = 1, 2
_ZSTD = b"\x28\xb5\x2f\xfd"


def _entry(kind: int, arch: int, code: bytes, *, unpacked_bytes: int = 0) -> bytes:
    """One chip's code, padded to eight as the compiler does; compressed if `unpacked_bytes`."""
    stored = len(code) if unpacked_bytes else 0
    padded = code + bytes(-len(code) % 8)
    head = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(padded), stored, 0, 0, 0, arch)
    head += bytes(40 - len(head)) + struct.pack("<QQQ", 0x11, 0, unpacked_bytes)
    return head + padded


def _cubin(*symbols: str, filler: int = 40) -> bytes:
    return b"\x7fELF" + "\0".join(("", *symbols, "")).encode() + b"\xaa" * filler


def _container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def _library(*containers: bytes, section: bytes = b".nv_fatbin") -> bytes:
    """A 64-bit ELF file of three sections: none, the GPU code, the names."""
    names = b"\0" + section + b"\0.shstrtab\0"
    code = bytes(16).join(containers)  # with padding in between
    code_at = 64
    names_at = code_at + len(code)
    table_at = names_at + len(names)
    head = bytearray(64)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", head, 0x28, table_at)
    struct.pack_into("<HHH", head, 0x3A, 64, 3, 2)

    def section_header(name: int, start: int, size: int) -> bytes:
        return struct.pack("<IIQQQQ", name, 1, 0, 0, start, size).ljust(64, b"\0")

    table = bytes(64) + section_header(1, code_at, len(code))
    table += section_header(2 + len(section), names_at, len(names))
    return bytes(head) + code + names + table


def _blanked(library: bytes, arch: int = 90, drop: str = "", **more: object) -> bytes:
    decompress = more.get("decompress")
    assert decompress is None or callable(decompress)
    pattern = re.compile(drop.encode()) if drop else None
    found = fatbin.slim(library, arch, pattern, decompress)
    result = bytearray(library)
    for start, size in found.blanks:
        result[start : start + size] = bytes(size)
    assert found.blanked_bytes == sum(size for _, size in found.blanks)
    return bytes(result)


def test_code_for_other_chips_is_blanked_and_nothing_moves() -> None:
    wanted, other, text = _cubin("hopper"), _cubin("ampere"), b"ptx of 80"
    library = _library(
        _container(_entry(_ELF, 80, other), _entry(_ELF, 90, wanted), _entry(_PTX, 80, text)),
        _container(_entry(_ELF, 100, other)),
    )
    result = _blanked(library)
    assert len(result) == len(library)
    assert result.index(wanted) == library.index(wanted)
    assert b"ampere" not in result
    assert text not in result
    assert result.count(struct.pack("<I", 0xBA55ED50)) == 2  # containers and headers stay


@pytest.mark.parametrize(
    ("arch", "there", "kept"),
    [
        (90, [(_ELF, 80), (_ELF, 90), (_PTX, 90)], [(_ELF, 90)]),
        (90, [(_ELF, 80), (_PTX, 80), (_PTX, 100)], [(_PTX, 80)]),
        (89, [(_ELF, 80), (_ELF, 86), (_ELF, 90)], [(_ELF, 86)]),
        (86, [(_ELF, 75), (_ELF, 89)], []),
        (103, [(_ELF, 90), (_ELF, 100)], [(_ELF, 100)]),
    ],
    ids=["its own", "translated", "of a lower minor", "nothing fits", "newer minor"],
)
def test_a_card_keeps_what_the_driver_would_take(
    arch: int, there: list[tuple[int, int]], kept: list[tuple[int, int]]
) -> None:
    entries = tuple(fatbin.Entry(kind, code, 0, 8, 8, 0) for kind, code in there)
    assert [(e.kind, e.arch) for e in fatbin.usable(entries, arch)] == kept


def test_kernels_that_are_not_wanted_take_their_container_along() -> None:
    def decompress(data: bytes, size: int) -> bytes:
        plain = zlib.decompress(data[4:])
        assert len(plain) == size
        return plain

    packed_code = _cubin("unwanted_kernel", filler=500)
    packed = _ZSTD + zlib.compress(packed_code)
    kept = _cubin("wanted_kernel")
    library = _library(
        _container(_entry(_ELF, 90, packed, unpacked_bytes=len(packed_code))),
        _container(_entry(_ELF, 90, kept)),
        _container(_entry(_ELF, 90, _cubin("unwanted_too"))),
        _container(_entry(_ELF, 90, b"\x01unreadable unwanted")),
    )
    result = _blanked(library, drop="unwanted", decompress=decompress)
    assert packed not in result
    assert b"unwanted_too" not in result
    assert kept in result
    assert b"unreadable unwanted" in result  # what cannot be read is kept
    assert packed in _blanked(library, drop="unwanted")  # as here, without a way to decompress


def test_libraries_without_gpu_code_stay_as_they_are() -> None:
    library = _library(_container(_entry(_ELF, 80, _cubin("x"))), section=b".text")
    assert _blanked(library) == library


def test_an_entry_that_leads_outside_ends_its_container() -> None:
    broken = struct.pack("<HHIQIIHHI", _ELF, 1, 64, 1 << 40, 0, 0, 0, 0, 80).ljust(64, b"\0")
    library = _library(_container(_entry(_ELF, 80, _cubin("x")), broken))
    assert b"x\0" + b"\xaa" not in _blanked(library)


@pytest.mark.parametrize("octets", [b"", b"#!/bin/sh\n" * 20, b"\x7fELF\x01\x01" + bytes(80)])
def test_what_is_no_library_is_an_error(octets: bytes) -> None:
    with pytest.raises(fatbin.FatbinError):
        fatbin.slim(octets, 90, None, None)


def test_blanked_octets_are_holes_on_disk(tmp_path: Path) -> None:
    large = _cubin("ampere", filler=4 << 20)
    path = tmp_path / "lib.so"
    path.write_bytes(_library(_container(_entry(_ELF, 80, large), _entry(_ELF, 90, _cubin("h")))))
    path.chmod(0o755)
    size = path.stat().st_size
    told = bundle._slim(path, 90, "", tmp_path)
    assert path.stat().st_size == size
    assert path.stat().st_blocks * 512 < 1 << 20 < told["blanked_bytes"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert path.read_bytes() == _blanked(path.read_bytes())


# Names as nvcc mangles them in FlashAttention 3, shortened in the middle.
_NAME = (
    "_ZN5flash16FlashAttnFwdSm90INS1_25CollectiveMainloopFwdSm90ILi2E{}ELi{}ENS_{}EfNS_4arch4Sm90"
)


@pytest.mark.parametrize(
    ("head", "element", "options", "kept"),
    [
        (128, "10bfloat16_t", {}, True),
        (64, "10bfloat16_t", {}, False),
        (256, "10bfloat16_t", {}, False),
        (128, "6half_t", {}, False),
        (128, "12float_e4m3_t", {}, False),
        (128, "12float_e4m3_t", {"keep_fp8": True}, True),
        (64, "12float_e4m3_t", {"keep_fp8": True}, False),
        (128, "6half_t", {"keep_fp16": True}, True),
        (64, "10bfloat16_t", {"heads": (64, 128)}, True),
        (12, "10bfloat16_t", {}, False),
    ],
)
def test_attention_is_kept_by_head_and_element(
    head: int, element: str, options: dict[str, object], *, kept: bool
) -> None:
    settings = {"heads": (128,), "keep_fp8": False, "keep_fp16": False} | options
    drop = re.compile(kinds.attention_drop(**settings))  # type: ignore[arg-type]
    name = _NAME.format("N4cute5tupleIJNS7_ILi128EEENS7_ILi112EEEE", head, element)
    assert (drop.search(name) is None) == kept
    assert drop.search(name.replace("FlashAttnFwdSm90I", "FlashAttnFwdSm80I"))
