"""Keys as people see them: never a key, and of its digest no more than tells two files apart."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from backends.keys.changes import REVOKED, state_of
from proxy.contract.keys import KeyRecord

HEADINGS = ("ID", "TENANT", "NAME", "STATE", "CREATED", "ENDS", "ONLY")
DIGEST_SHOWN = 8


def record_shown(key: KeyRecord, now_s: float) -> dict[str, Any]:
    """Return what may be shown of a key."""
    return {
        "key_id": key.key_id,
        "tenant": key.tenant,
        "name": key.name,
        "state": state_of(key, now_s),
        "created_at": moment(key.created_at),
        "expires_at": moment(key.expires_at),
        "revoked_at": moment(key.revoked_at),
        "models": list(key.models),
        "classes": list(key.classes),
        "regions": list(key.regions),
        "digest": key.digest[:DIGEST_SHOWN] + "…",
    }


def story(key: KeyRecord, now_s: float) -> str:
    """Tell of a key in a sentence."""
    name = f" '{key.name}'" if key.name else ""
    ends = f"until {moment(key.expires_at)}" if key.expires_at else "without an end"
    only = _only(key)
    return f"key {key.key_id}{name} of tenant {key.tenant}, {ends}" + (only and f", only {only}")


def table(keys: Sequence[KeyRecord], now_s: float) -> str:
    """Return one line for each key."""
    rows = [HEADINGS]
    for key in keys:
        state = state_of(key, now_s)
        ends = key.revoked_at if state == REVOKED else key.expires_at
        created = moment(key.created_at) or "-"
        rows.append(
            (key.key_id, key.tenant, key.name or "-", state, created,
             moment(ends) or "never", _only(key) or "-")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _only(key: KeyRecord) -> str:
    return " ".join(
        f"{what}={','.join(names)}"
        for what, names in (
            ("models", key.models),
            ("classes", key.classes),
            ("regions", key.regions),
        )
        if names
    )


def page(shown: dict[str, Any]) -> str:
    """Return all of one key in lines; where it says nothing, what that means."""
    unsaid = {"expires_at": "never", "revoked_at": "never", "name": "-"}
    unsaid |= dict.fromkeys(("models", "classes", "regions"), "what its tenant may")
    lines = []
    for name, value in shown.items():
        said = ", ".join(value) if isinstance(value, list) else value
        lines.append(f"{name:<11} {said or unsaid[name]}")
    return "\n".join(lines)


def moment(at_s: float) -> str | None:
    """Write a moment as RFC 3339 does, in UTC."""
    if not at_s:
        return None
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
