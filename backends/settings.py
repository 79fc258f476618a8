"""The settings of a run: flag, then environment, then file, then default."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from backends.offline.setting import exposed, unreadable
from backends.spec import pool_specs
from backends.tracing import check_endpoint, missing_exporter
from backends.up_plan import Plan, keyed
from proxy.config import (
    EMBEDDED_DEFAULT,
    ENVIRONMENT_PREFIX,
    Config,
    ConfigError,
    ManagerConfig,
    OfflineConfig,
    ProxyConfig,
    load_config,
    override,
    parse_config,
)
from proxy.flags import environment_values
from proxy.secret_files import is_secret
from proxy.secret_files import variable as variable_of

S = TypeVar("S", ManagerConfig, OfflineConfig)
# Field of a section, its flag's name in the parser, and its environment variable.
_Settings = tuple[tuple[str, str, str], ...]
MANAGER_SETTINGS: _Settings = (
    ("host", "manager_host", "MANAGER_HOST"),
    ("port", "manager_port", "MANAGER_PORT"),
    ("run_dir", "run_dir", "RUN_DIR"),
    ("gpus", "gpus", "GPUS"),
    ("keys_path", "keys_path", "KEYS_PATH"),
    ("keys_follow", "keys_follow", "KEYS_FOLLOW"),
    ("keys_listen", "keys_listen", "KEYS_LISTEN"),
    ("warm_page_cache", "warm_page_cache", "WARM_PAGE_CACHE"),
)
OFFLINE_SETTINGS: _Settings = (
    ("enabled", "offline", "OFFLINE"),
    ("host", "offline_host", "OFFLINE_HOST"),
    ("port", "offline_port", "OFFLINE_PORT"),
    ("store", "offline_store", "STORE"),
    ("work_key", "offline_work_key", "WORK_KEY"),
    ("work_url", "offline_work_url", "WORK_URL"),
)


def read_config(path: str | None, environ: Mapping[str, str]) -> tuple[Config, str | None]:
    """Return the configuration and its path; with no path, the one that is built in.

    Raises `ConfigError`.
    """
    path = path or environ.get(ENVIRONMENT_PREFIX + "CONFIG") or None
    if path is None:
        return parse_config(EMBEDDED_DEFAULT, "the built-in configuration"), None
    return load_config(path), path


def manager_config_of(
    given: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[Config, str | None]:
    """Return the configuration of `doherty manager`. Raises `ConfigError`."""
    config, path = read_config(given["config"], environ)
    manager = manager_settings(config.manager, given, environ)
    offline = offline_settings(config.offline, given, environ)
    proxy = override(config.proxy, environment_values(environ), ENVIRONMENT_PREFIX + "{env}")
    check_endpoint(proxy)
    return msgspec.structs.replace(config, manager=manager, offline=offline, proxy=proxy), path


def offline_config_of(
    given: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[Config, str | None]:
    """Return the configuration of `doherty offline`. Raises `ConfigError`."""
    return manager_config_of(given, environ)


def plan_of(given: Mapping[str, Any], environ: Mapping[str, str]) -> Plan:
    """Return what `doherty up` is to run. Raises `ConfigError`."""
    config, path = read_config(given["config"], environ)
    if not any(pool.autoscale or pool.replicas for pool in pool_specs(config)):
        raise ConfigError(
            f"{path}: no replica is configured, so there is nothing to bring up; "
            "name a model with a pool of at least one replica"
        )
    flags = {k: v for k, v in given.items() if k in ProxyConfig.__struct_fields__}
    for name in ("manager_url", "worker_urls"):
        if name in flags:
            raise ConfigError(
                f"--{name.replace('_', '-')}: `doherty up` starts its own manager; "
                "use `doherty proxy` in front of replicas that run already"
            )
    proxy = override(config.proxy, environment_values(environ), ENVIRONMENT_PREFIX + "{env}")
    proxy = override(proxy, flags, "--{flag}")
    check_endpoint(proxy)
    if missing := missing_exporter(proxy, environ):
        raise ConfigError(missing)  # before replicas have been started for a proxy that cannot be
    manager = manager_settings(config.manager, given, environ)
    offline = offline_settings(config.offline, given, environ)
    if manager.port == 0 and offline.port == OfflineConfig().port:
        # Whoever takes any port for the one means it for the other.
        offline = msgspec.structs.replace(offline, port=0)
    if keyed(config, proxy, manager):
        _check_tenants(config, proxy, manager)
        if offline.enabled and proxy.internal_key is None:
            # Of this run alone: by it the proxy and the offline service know each other.
            flags["internal_key"] = secrets.token_urlsafe(32)
            proxy = msgspec.structs.replace(proxy, internal_key=flags["internal_key"])
    if proxy.access_log == "-":  # the terminal belongs to the progress of `up`
        flags["access_log"] = f"{manager.run_dir}/logs/access.log"
    return Plan(
        config_path=path,
        config=config,
        proxy=proxy,
        proxy_flags=flags,
        manager=manager,
        offline=offline,
    )


def _check_tenants(config: Config, proxy: ProxyConfig, manager: ManagerConfig) -> None:
    """Refuse tenants of which nobody could ever show that he is one. Raises `ConfigError`."""
    kept = proxy.keys_path or manager.keys_path or manager.keys_follow
    if config.tenants and not kept and config.jwt is None and proxy.api_key is None:
        raise ConfigError(
            "tenants: nobody can show that he is one of them; set proxy.keys_path and make keys "
            f"(doherty keys create --tenant {config.tenants[0].name}), or set jwt"
        )


def manager_settings(
    base: ManagerConfig, given: Mapping[str, Any], environ: Mapping[str, str]
) -> ManagerConfig:
    """Return `base` with flags and environment laid over it. Raises `ConfigError`."""
    return _laid_over(base, MANAGER_SETTINGS, given, environ)


def offline_settings(
    base: OfflineConfig, given: Mapping[str, Any], environ: Mapping[str, str]
) -> OfflineConfig:
    """Return `base` with flags and environment laid over it. Raises `ConfigError`."""
    offline = _laid_over(base, OFFLINE_SETTINGS, given, environ)
    problem = exposed(offline) or unreadable(offline.store)
    if offline.enabled and problem is not None:
        raise ConfigError(problem)
    return offline


def _laid_over(
    base: S, settings: _Settings, given: Mapping[str, Any], environ: Mapping[str, str]
) -> S:
    merged = {name: getattr(base, name) for name in base.__struct_fields__}
    for field, flag, variable in settings:
        value, source = given.get(flag), "--" + flag.replace("_", "-")
        if value is None:
            source = ENVIRONMENT_PREFIX + variable
            value = variable_of(environ, source, secret=is_secret(field))
        if value is None:
            continue
        merged[field] = value
        try:  # one by one, so that an error names who said it
            msgspec.convert({field: value}, type(base), strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: {str(error).split(' - at ')[0]}") from error
    try:
        return msgspec.convert(merged, type(base), strict=False)
    except msgspec.ValidationError as error:  # two that contradict each other
        raise ConfigError(str(error)) from error
