"""A Doherty with tenants, their keys in a file written by hand, and simulated replicas."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.fleet import MODEL, FleetOptions, Ports

DOHERTY = f"{sys.executable} -m backends.cli"
_SALT = "a salt of a load test, and no more"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What serves."""

    replicas: int = 2
    workers: int = 4
    profile: str = "h200-8b"
    time_scale: float = 1.0
    max_inputs: int = 0
    chunk_tokens: int = 2048  # of prompts in a step of an engine, as online work has it
    late: str = "serve"
    online_reserve: float = 0.0
    doherty: str = DOHERTY


def key_of(tenant: str) -> str:
    """Return the key of a tenant: nothing that anybody could use elsewhere."""
    return f"sk-loadtest-{tenant}-" + hashlib.sha256(tenant.encode()).hexdigest()[:24]


def write_keys(path: Path, tenants: tuple[str, ...]) -> None:
    """Write a key for each tenant; only its owner may read the file."""
    keys = [
        {
            "key_id": f"id-{tenant}",
            "tenant": tenant,
            "digest": hashlib.sha256(key_of(tenant).encode()).hexdigest(),
        }
        for tenant in tenants
    ]
    path.touch(mode=0o600)
    path.write_bytes(orjson.dumps({"version": 1, "salt": _SALT, "keys": keys}))


def configuration(
    setting: Setting, weights: dict[str, float], ports: Ports, folder: str
) -> dict[str, Any]:
    """Return the configuration of one run, its keys written beside it."""
    keys = Path(folder).parent / "keys.json"
    write_keys(keys, tuple(weights))
    args = ["--profile", setting.profile, "--time-scale", f"{setting.time_scale:g}"]
    args += ["--stream-interval", "10", "--max-num-batched-tokens", str(setting.chunk_tokens)]
    pool: dict[str, Any] = {"engine": "simulator", "replicas": setting.replicas, "args": args}
    if setting.max_inputs:
        pool["max_inputs"] = setting.max_inputs
    return {
        "proxy": {
            "port": ports.proxy,
            "admin_port": ports.admin,
            "workers": setting.workers,
            "access_log": "off",
            "keys_path": str(keys),
        },
        "manager": {"port": ports.manager, "run_dir": folder},
        "models": [{"name": MODEL, "pools": [pool]}],
        "tenants": [{"name": name, "weight": weight} for name, weight in weights.items()],
        "classes": {"late": setting.late, "online_reserve": setting.online_reserve},
    }


def fleet_options(setting: Setting) -> FleetOptions:
    return FleetOptions(replicas=setting.replicas, workers=setting.workers, doherty=setting.doherty)
