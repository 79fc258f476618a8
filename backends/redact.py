"""What may be shown of a configuration: everything but what opens a door."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from proxy.config import Config
from proxy.contract import NO_REGION

HIDDEN = "***"
_KEYS = ("api_key", "admin_api_key", "peer_key", "internal_key")
_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NOT_SECRET = re.compile(r"tokens|tokenizer", re.IGNORECASE)  # --max-num-batched-tokens
_USERINFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(config: Config) -> dict[str, Any]:
    """Return `config` as plain values, secrets replaced."""
    value = msgspec.to_builtins(config)
    proxy = value["proxy"]
    del proxy["access"]  # what the top of the file says; it is shown there
    if proxy["region"] == NO_REGION:
        proxy["region"] = value["region"]  # as it is laid in when the proxy starts
    proxy.update({name: HIDDEN for name in _KEYS if proxy[name] is not None})
    proxy["worker_urls"] = [_USERINFO.sub(HIDDEN, url) for url in proxy["worker_urls"]]
    if proxy["manager_url"] is not None:
        proxy["manager_url"] = _USERINFO.sub(HIDDEN, proxy["manager_url"])
    for part in (value["jwt"] or {}, *value["remote_regions"]):
        part.update(_without_userinfo(part))
    cluster = value["manager"]["ray"]
    cluster["env"] = {k: HIDDEN if secret(k) else v for k, v in cluster["env"].items()}
    if cluster["runtime_env"]:
        cluster["runtime_env"] = HIDDEN  # whatever Ray takes, tokens of registries and of clouds
    offline = value["offline"]
    if offline["work_key"] is not None:
        offline["work_key"] = HIDDEN
    places = ((proxy, "manager_url"), (value["manager"], "keys_follow"))
    for part, name in (*places, (offline, "store"), (offline, "work_url")):
        if part[name] is not None:
            part[name] = _USERINFO.sub(HIDDEN, part[name])
    for model in value["models"]:
        for pool in model["pools"]:
            pool["args"] = redacted_args(pool["args"])
            pool["env"] = {k: HIDDEN if secret(k) else v for k, v in pool["env"].items()}
    return dict(value)


def _without_userinfo(part: Mapping[str, Any]) -> dict[str, str]:
    """Return its addresses as they may be shown."""
    names = ("url", "jwks_url")
    return {name: _USERINFO.sub(HIDDEN, part[name]) for name in names if part.get(name)}


def redacted_args(args: Sequence[str]) -> list[str]:
    """Return an engine's arguments, the values of secret flags replaced."""
    shown: list[str] = []
    hide_next = False
    for arg in args:
        flag, equals, _ = arg.partition("=")
        is_flag = flag.startswith("-")
        if hide_next and not is_flag:
            shown.append(HIDDEN)
        elif is_flag and equals and secret(flag):
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(arg)
        # A flag may take several values; they are hidden up to the next flag.
        hide_next = (is_flag and not equals and secret(flag)) or (hide_next and not is_flag)
    return shown


def secrets_of(args: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values that `redacted` hides of a pool, the longest first, to strike them out.

    Very short ones stay: struck out of a text they would make it unreadable and hide nothing.
    """
    hidden = zip(args, redacted_args(args), strict=True)
    values = {arg.partition("=")[2] or arg for arg, shown in hidden if arg != shown}
    values |= {value for name, value in env.items() if secret(name)}
    return tuple(sorted((v for v in values if len(v) > 3), key=lambda v: (-len(v), v)))


def secret(name: str) -> bool:
    """Say whether what is called `name` may hold a secret."""
    return bool(_SECRET.search(_NOT_SECRET.sub("", name)))
