"""What a tenant, or one key of it, gets with a model and a class: in words, and who says each.

Over the configuration and the keys as they are read; what a proxy does follows from the same two by
the same functions (`proxy.config_policy`), so `doherty check` cannot say one thing and a proxy do
another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from backends.keys.changes import NoSuchKeyError, find
from backends.keys.file import load
from backends.keys.place import place_of
from proxy.config import Config, ConfigError, PoolConfig
from proxy.config_access import ModelAccess, TenantConfig
from proxy.config_policy import WORK_CLASSES, KeyPolicy, class_granted, policy_of
from proxy.contract.key_file import KeyFileError
from proxy.contract.keys import KeyRecord, KeySet


class Row(NamedTuple):
    """One thing that holds, and what says so."""

    what: str
    value: str
    origin: str = ""


class Question(NamedTuple):
    """What is asked; "" where nothing is said of it. One of tenant and key is there."""

    tenant: str = ""
    key_id: str = ""
    model: str = ""
    work_class: str = ""


def explain(options: argparse.Namespace, config: Config, environ: Mapping[str, str]) -> str:
    """Answer what the command line asks. Raises `ConfigError`."""
    asked = Question(options.tenant, options.key, options.model, options.work_class)
    if not asked.tenant and not asked.key_id:
        raise ConfigError("of whom? say --tenant NAME or --key ID as well")
    keys = KeySet()
    if asked.key_id:
        try:
            keys = load(place_of(options.keys or config.proxy.keys_path, None, environ).path)
        except KeyFileError as error:
            raise ConfigError(str(error)) from error
    return table(effective_policy(config, keys, asked, time.time()))


def effective_policy(config: Config, keys: KeySet, asked: Question, now_s: float) -> list[Row]:
    """Return all that holds. Raises `ConfigError` where a name is not there."""
    key = _key(keys, asked, now_s) if asked.key_id else None
    tenant = _tenant(config, key.tenant if key else asked.tenant)
    policy = policy_of(tenant, key)
    access = config.access.models.get(_model(config, asked.model), ModelAccess())
    rows = [Row("tenant", tenant.name, "tenants")]
    if key is not None:
        rows.append(Row("key", _named(key), _standing(key, policy, now_s)))
    rows += [
        _admission(policy, key, asked.model, now_s),
        *_classes(config, tenant, policy, asked),
        _place(config, policy, access),
        *_limits(tenant),
        *_shares(config, tenant),
        *_times(config, tenant),
        _cache(config, tenant),
    ]
    if asked.model:
        rows.append(_price(access))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return them in lines, each with where it comes from."""
    wide = max(len(row.what) for row in rows)
    full = max(len(row.value) for row in rows)
    lines = [
        f"{row.what:<{wide}}  {row.value:<{full}}  {f'({row.origin})' if row.origin else ''}"
        for row in rows
    ]
    return "\n".join([line.rstrip() for line in lines])


# --- who, and what ----------------------------------------------------------------------------


def _tenant(config: Config, name: str) -> TenantConfig:
    found = {tenant.name: tenant for tenant in config.tenants}
    if name not in found:
        raise ConfigError(f"tenant '{name}' is not configured{_nearest(name, list(found))}")
    return found[name]


def _key(keys: KeySet, asked: Question, now_s: float) -> KeyRecord:
    names = [name for key in keys.keys for name in (key.key_id, key.name) if name]
    if asked.key_id not in names:
        near = _nearest(asked.key_id, names)
        raise ConfigError(f"key '{asked.key_id}' is not in the key file{near}")
    try:
        key = find(keys, asked.key_id, now_s)
    except NoSuchKeyError as error:
        raise ConfigError(str(error)) from error
    if asked.tenant and key.tenant != asked.tenant:
        raise ConfigError(f"key '{asked.key_id}' is of tenant '{key.tenant}'")
    return key


def _model(config: Config, name: str) -> str:
    served = {model.name: model.name for model in config.models}
    for model in config.models:
        served |= {adapter: model.name for pool in model.pools for adapter in pool.adapters}
    if name and config.models and name not in served and not config.remote_regions:
        raise ConfigError(f"model '{name}' is not configured{_nearest(name, list(served))}")
    return served.get(name, name)


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there are {', '.join(sorted(names)[:10])}" if names else "; there is none"


def _named(key: KeyRecord) -> str:
    return f"{key.key_id} ({key.name})" if key.name else key.key_id


def _standing(key: KeyRecord, policy: KeyPolicy, now_s: float) -> str:
    if key.revoked_at:
        return "revoked"
    if key.expires_at and key.expires_at <= now_s:
        return "expired"
    return policy.flaw or "in force"


def _admission(policy: KeyPolicy, key: KeyRecord | None, model: str, now_s: float) -> Row:
    """Say whether a request is let in at all, apart from how much has been used."""
    if key is not None:
        standing = _standing(key, policy, now_s)
        if standing != "in force":
            return Row("admitted", "no: 401", f"the key: {standing}")
    if policy.models is None:
        return Row("models", "all")
    if model and model not in policy.models:
        said = f"no: 404, as if there were no {model}; only {', '.join(sorted(policy.models))}"
        return Row("admitted", said, _from(key, "models"))
    return Row("models", ", ".join(sorted(policy.models)), _from(key, "models"))


def _from(key: KeyRecord | None, field: str) -> str:
    return f"key's {field}" if key is not None and getattr(key, field) else f"tenant's {field}"


# --- class and place --------------------------------------------------------------------------


def _classes(config: Config, tenant: TenantConfig, policy: KeyPolicy, asked: Question) -> list[Row]:
    """Say which class a request gets, for the one that was asked for, or for each."""
    pools = _pools(config, asked.model)
    if asked.work_class:
        wishes: list[tuple[str, str]] = [(asked.work_class, f"asked for {asked.work_class}")]
    else:
        default = tenant.work_class or (pools[0].work_class if pools else "online")
        origin = "tenant's class" if tenant.work_class else "the pool's class"
        wishes = [(default, f"says none: {origin}")]
        wishes += [(name, f"asked for {name}") for name in WORK_CLASSES if name != default]
    rows = []
    for wish, words in wishes:
        granted = class_granted(wish, policy.classes)
        why = words if granted == wish else f"{words}; the classes allow no more"
        rows.append(Row("class", granted, why))
    return rows


def _pools(config: Config, model: str) -> list[PoolConfig]:
    return [
        pool
        for each in config.models
        for pool in each.pools
        if pool.serves == "requests" and (not model or model in (each.name, *pool.adapters))
    ]


def _place(config: Config, policy: KeyPolicy, access: ModelAccess) -> Row:
    """Say where it may be computed, and what that means for a request that comes here."""
    of_key, of_model = policy.regions, frozenset(access.regions) or None
    if of_key is None and of_model is None:
        return Row("regions", "all")
    allowed = of_key if of_model is None else of_model if of_key is None else of_key & of_model
    assert allowed is not None
    said_by = [
        name for name, said in (("tenant or key", of_key), ("model", of_model)) if said is not None
    ]
    origin = f"{' and '.join(said_by)}; here is {config.region}"
    remotes = {remote.region for remote in config.remote_regions}
    shown = ", ".join(sorted(allowed)) or "none"
    if config.region in allowed:
        return Row("regions", shown, origin)
    if allowed & remotes:
        return Row("regions", f"{shown}: every request is sent there", origin)
    return Row("regions", f"{shown}: 403, no such region is reached from here", origin)


# --- how much, how soon -----------------------------------------------------------------------


def _limits(tenant: TenantConfig) -> list[Row]:
    limits = {
        "requests/min": tenant.requests_per_min,
        "tokens/min": tenant.tokens_per_min,
        "concurrent": tenant.max_concurrent,
        "tokens/day": tenant.tokens_per_day,
        "budget/day": tenant.budget_per_day,
    }
    rows = [
        Row(what, f"{value:,}" if isinstance(value, int) else f"{value:,.2f}", "tenant")
        for what, value in limits.items()
        if value or (what == "budget/day" and value is not None)
    ]
    return rows or [Row("limits", "none")]


def _shares(config: Config, tenant: TenantConfig) -> list[Row]:
    whole = sum(each.weight for each in config.tenants)
    said = f"{tenant.weight:g} of {whole:g}: {tenant.weight / whole:.0%} if all want more"
    rows = [Row("share", said, "tenant's weight")]
    if config.classes.online_reserve:
        said = f"{config.classes.online_reserve:.0%} of max_inputs for online alone"
        rows.append(Row("reserve", said, "classes"))
    return rows


def _times(config: Config, tenant: TenantConfig) -> list[Row]:
    if not tenant.slo_ttft_ms:
        return [Row("deadline", "what the request says", f"late: {config.classes.late}")]
    said = f"first token in {tenant.slo_ttft_ms} ms, of online requests that say none"
    return [Row("deadline", said, f"tenant's slo_ttft_ms; late: {config.classes.late}")]


def _cache(config: Config, tenant: TenantConfig) -> Row:
    if tenant.cache_isolation:
        return Row("cache", "its own, in proxies and engines", "tenant's cache_isolation")
    if config.proxy.tenant_isolation:
        return Row("cache", "each key's own, in proxies and engines", "proxy.tenant_isolation")
    return Row("cache", "shared with other tenants")


def _price(access: ModelAccess) -> Row:
    if not (access.prompt_price or access.completion_price or access.cached_price):
        return Row("price", "none: budgets do not count it")
    said = (
        f"{access.prompt_price:g} prompt, {access.cached_price:g} cached, "
        f"{access.completion_price:g} completion, a million tokens"
    )
    return Row("price", said, "model")
