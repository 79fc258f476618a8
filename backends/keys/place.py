"""Where the keys are, and what the configuration beside them says of tenants.

The file is said by a flag, else by the environment, else by the configuration; whoever runs
`doherty up` and `doherty keys` with the same configuration speaks of the same file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from proxy.config import ENVIRONMENT_PREFIX, Config, ConfigError, TenantConfig, load_config

_ONE = {"classes": "class", "models": "model", "regions": "region"}
KEYS_VARIABLE = ENVIRONMENT_PREFIX + "KEYS_PATH"


class Place(msgspec.Struct, frozen=True):
    """A file of keys, and the configuration that it belongs to, if that is known."""

    path: str
    config: Config | None = None
    config_path: str = ""


def place_of(keys: str | None, config_path: str | None, environ: Mapping[str, str]) -> Place:
    """Raises `ConfigError` where no file is named."""
    config_path = config_path or environ.get(ENVIRONMENT_PREFIX + "CONFIG") or None
    config = load_config(config_path) if config_path else None
    configured = (config.proxy.keys_path or config.manager.keys_path) if config else None
    path = keys or environ.get(KEYS_VARIABLE) or configured
    if not path and config and config.manager.keys_follow:
        raise ConfigError(
            f"{config_path} has no file of keys: it follows {config.manager.keys_follow}, "
            "where keys are made"
        )
    if not path:
        where = f"proxy.keys_path in {config_path}" if config_path else "--config FILE"
        raise ConfigError(f"which file of keys? say it by --keys FILE, {KEYS_VARIABLE} or {where}")
    return Place(path, config, config_path or "")


def usage_log_of(config_path: str | None, environ: Mapping[str, str]) -> str:
    """Return the file of usage records. Raises `ConfigError` where none is named."""
    config_path = config_path or environ.get(ENVIRONMENT_PREFIX + "CONFIG") or None
    configured = load_config(config_path).proxy.usage_log if config_path else "off"
    path = environ.get(ENVIRONMENT_PREFIX + "USAGE_LOG") or configured
    if path in {"off", "-"}:
        raise ConfigError("which usage records? name files, or proxy.usage_log by --config FILE")
    return path


def unknown_rights(
    place: Place, *, models: Iterable[str] = (), regions: Iterable[str] = ()
) -> list[str]:
    """Say which names the configuration does not have; they may come with another one, or late."""
    config = place.config
    if config is None:
        return []
    served = {model.name for model in config.models}
    served |= {name for model in config.models for pool in model.pools for name in pool.adapters}
    reached = {config.region, *(remote.region for remote in config.remote_regions)}
    flaws = [("region", name, reached) for name in regions if name not in reached]
    if served and not config.remote_regions:  # other regions, and engines that run, have others
        flaws += [("model", name, served) for name in models if name not in served]
    return [_unknown(what, name, known, place.config_path) for what, name, known in flaws]


def check_rights(
    place: Place,
    tenant: str,
    *,
    models: Iterable[str] = (),
    classes: Iterable[str] = (),
    regions: Iterable[str] = (),
) -> None:
    """Refuse a key that could do nothing. Raises `ConfigError` with the nearest name."""
    config = place.config
    if config is None:
        return
    tenants = {one.name: one for one in config.tenants}
    if not tenants:
        raise ConfigError(
            f"{place.config_path} has no tenants, and a key is of one of them; "
            f"add `tenants: [{{name: {tenant}}}]`"
        )
    if tenant not in tenants:
        raise ConfigError(_unknown("tenant", tenant, tenants, place.config_path))
    _check_granted(tenants[tenant], "classes", classes, place.config_path)
    _check_granted(tenants[tenant], "models", models, place.config_path)
    _check_granted(tenants[tenant], "regions", regions, place.config_path)


def _check_granted(tenant: TenantConfig, what: str, asked: Iterable[str], source: str) -> None:
    granted: Sequence[str] = getattr(tenant, what)
    for name in asked:
        if granted and name not in granted:
            raise ConfigError(
                f"tenant '{tenant.name}' may not have the {_ONE[what]} '{name}', so no key of it "
                f"may; {source} allows {', '.join(granted)}"
            )


def _unknown(what: str, name: str, known: Iterable[str], source: str) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    return f"{source} has no {what} '{name}'; {hint}"
