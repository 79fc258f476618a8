"""The reference of the configuration: complete, and equal to what is shipped."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from backends.cli import main
from backends.reference import reference
from backends.serve import _reloaded
from proxy.config import Config, OfflineConfig, ProxyConfig
from proxy.config_reading import describe_fields
from proxy.config_schema import json_schema

GUIDE = Path(__file__).parents[2] / "deploy/guides/reference.md"


@pytest.fixture(scope="module")
def page() -> str:
    return reference(("manager_host", "manager_port", "run_dir", "offline", "offline_port"))


def _rows(page: str, section: str) -> dict[str, list[str]]:
    part = page.split(f"\n## `{section}`\n")[1].split("\n## ", maxsplit=1)[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE)
    return {key: re.split(r"(?<!\\) \| ", rest) for key, rest in rows}


def test_the_guide_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--reference"]) == 0
    printed = capsys.readouterr().out
    assert GUIDE.read_text(encoding="utf-8") == printed, (
        "doherty check --reference > deploy/guides/reference.md"
    )


def test_it_has_every_key_of_every_section(page: str) -> None:
    schema = json_schema()
    told = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    keys = [key for section in (schema, *schema["$defs"].values()) for key in section["properties"]]
    assert sorted(told) == sorted(keys)


def test_every_flag_of_the_proxy_is_there_with_its_twin(page: str) -> None:
    rows = _rows(page, "proxy")
    for name, _, _ in describe_fields(ProxyConfig):
        flag, variable = rows[name][3:5]
        positive = flag.strip("`").replace("--no-", "--")
        assert positive == "--" + name.replace("_", "-")
        files = f", `DOHERTY_{name.upper()}_FILE`" if name.endswith("_key") else ""
        assert variable == f"`DOHERTY_{name.upper()}`{files}"
    assert rows["verify_replica_tls"][3] == "`--no-verify-replica-tls`"


def test_types_units_bounds_and_defaults(page: str) -> None:
    proxy, manager = _rows(page, "proxy"), _rows(page, "manager")
    assert proxy["port"][1:3] == ["integer 0 to 65535", "`8000`"]
    assert proxy["max_payload_size"][1:3] == ["integer ≥ 1, bytes", "`33554432` (32 MiB)"]
    assert proxy["queue_timeout_secs"][1:3] == ["number ≥ 0, s", "`60`"]
    assert proxy["worker_urls"][1:3] == ["list of string", ""]
    assert manager["snapshot_bytes_max"][2] == "`214748364800` (200 GiB)"
    assert _rows(page, "offline")["keep_secs"][2] == "`2592000`"
    assert _rows(page, "models[]")["name"][2] == "*required*"
    assert _rows(page, "models[].pools[].autoscale")["kv_target"][1] == "number > 0, ≤ 1"


def test_a_change_is_told_as_it_is_taken(page: str) -> None:
    proxy, offline = _rows(page, "proxy"), _rows(page, "offline")
    assert proxy["workers"][-1] == proxy["admin_api_key"][-1] == "upgrade"
    assert proxy["policy"][-1] == "reload"
    assert _rows(page, "manager")["gpus"][-1] == "restart"
    assert _rows(page, "tenants[]")["weight"][-1] == "reload"
    # What a manager takes of the section when it reads the file anew, and the service does, too.
    read = Config(offline=OfflineConfig(price_per_hour_max=5.0, hold_secs=5.0))
    taken = _reloaded(read, OfflineConfig()).offline
    for name, row in offline.items():
        changed = getattr(taken, name) != msgspec.structs.asdict(OfflineConfig())[name]
        assert changed == (row[-1] == "reload"), name
