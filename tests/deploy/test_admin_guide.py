"""The guide of the admin listener names every field of the view and every way to be refused."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from proxy.contract import view

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "deploy" / "guides" / "admin.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`]+)`", GUIDE))


def test_every_field_of_the_view_is_told() -> None:
    structs = [
        kind
        for kind in vars(view).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    ]
    fields = {field for struct in structs for field in struct.__struct_fields__}
    assert len(structs) > 10
    assert fields - QUOTED == set()


def test_every_refusal_is_told() -> None:
    codes: set[str] = set()
    for name in ("admin", "admin_guard", "operating"):
        text = (ROOT / "proxy" / "io" / f"{name}.py").read_text(encoding="utf-8")
        codes |= set(re.findall(r'RefusedError\(\s*\*\(\d+, "(\w+)"\)', text))
        codes |= set(re.findall(r'RefusedError\(\s*(?:\d+|status), "(\w+)"', text))
    codes -= {"unknown_path"}  # as everywhere
    assert len(codes) > 7
    told = set(re.findall(r"^\| \d+ `(\w+)`", GUIDE, re.MULTILINE))
    assert codes == told
