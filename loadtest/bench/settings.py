"""The settings in which a proxy is measured besides its defaults, as what its files would say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

TENANTS = 100
# None of them is ever reached: what is measured is the price of keeping count.
LIMITS = {
    "requests_per_min": 10_000_000,
    "tokens_per_min": 10_000_000_000,
    "max_concurrent": 100_000,
    "tokens_per_day": 1_000_000_000_000,
}
REGIONS = ("here", "there")

Settings = dict[str, Any]


def one_key(key: str) -> Settings:
    """Return the settings of a proxy with one key for all."""
    return {"proxy": {"api_key": key}}


def no_log() -> Settings:
    """Return those of one that writes no access log."""
    return {"proxy": {"access_log": "off"}}


def tenants(folder: Path, keys: Sequence[str]) -> Settings:
    """Return those of one with `TENANTS` tenants, all limits set; the first have a key each."""
    names = [f"tenant-{number}" for number in range(TENANTS)]
    records = [
        {
            "key_id": f"key-{name}",
            "tenant": name,
            "digest": hashlib.sha256(key.encode()).hexdigest(),
        }
        for name, key in zip(names, keys, strict=False)
    ]
    path = folder / "keys.json"
    path.touch(0o600)
    path.write_bytes(orjson.dumps({"version": 1, "salt": "0" * 32, "keys": records}))
    return {
        "proxy": {"keys_path": str(path)},
        "tenants": [{"name": name, **LIMITS} for name in names],
    }


def traced(port: int, share: float) -> Settings:
    """Return those of one that sends this share of its traces to a collector at `port`."""
    endpoint = f"http://127.0.0.1:{port}"
    return {"proxy": {"otlp_traces_endpoint": endpoint, "trace_sample_ratio": share}}


def region(number: int, ports: Sequence[int]) -> Settings:
    """Return those of one of two regions: their ports for clients stand before those for peers."""
    other = 1 - number
    here, there = ports[2 + number], ports[2 + other]
    return {
        "region": REGIONS[number],
        "proxy": {"peer_listen": f"127.0.0.1:{here}"},
        "remote_regions": [
            {
                "region": REGIONS[other],
                "url": f"http://127.0.0.1:{ports[other]}",
                "peer": f"127.0.0.1:{there}",
            }
        ],
    }
