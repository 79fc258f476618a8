"""`doherty check` of keys: whether the file can be used, and each key by its tenant's policy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

from backends.keys.changes import IN_FORCE, state_of
from backends.keys.place import KEYS_VARIABLE
from proxy.config import ENVIRONMENT_PREFIX, Config, ConfigError
from proxy.config_policy import flaws_of, shared_key
from proxy.contract.extras import install_command
from proxy.contract.key_file import KeyFileError, read_key_file

SOON_S = 14 * 86_400.0


def check_keys(config: Config, environ: Mapping[str, str], now_s: float) -> list[str]:
    """Return what to warn of. Raises `ConfigError` where proxies would not start."""
    return [*_lacking(config, environ), *_of_keys(config, environ, now_s)]


def _lacking(config: Config, environ: Mapping[str, str]) -> list[str]:
    """Return what would end a start, if it is here and in this environment that it is made."""
    lacking = []
    peer_key = environ.get(ENVIRONMENT_PREFIX + "PEER_KEY") or config.proxy.peer_key
    if config.manager.keys_listen and not peer_key:
        lacking.append("manager.keys_listen: set proxy.peer_key, the same in all regions")
    if config.jwt is not None and not all(map(find_spec, ("jwt", "cryptography"))):
        lacking.append(f"jwt: tokens are verified by PyJWT; install it: {install_command('jwt')}")
    return lacking


def _of_keys(config: Config, environ: Mapping[str, str], now_s: float) -> list[str]:
    path = environ.get(KEYS_VARIABLE) or config.proxy.keys_path or config.manager.keys_path
    if path is None:
        elsewhere = config.manager.keys_follow or config.proxy.manager_url or config.jwt
        if config.tenants and not elsewhere:
            return ["tenants: nobody can show that he is one of them; set proxy.keys_path or jwt"]
        return []
    if not os.path.exists(path):
        return [f"{path}: there are no keys yet, so nobody is let in; doherty keys create"]
    try:
        keys = read_key_file(path).keys
    except KeyFileError as error:
        raise ConfigError(f"keys_path: {error}") from error
    live = [key for key in keys if state_of(key, now_s) == IN_FORCE]
    warnings = flaws_of(live, config.access)
    # Not that of the environment, which in a shell is the key of whoever asks.
    warnings += filter(None, [shared_key(keys, config.proxy.api_key)])
    for key in live:
        left_s = key.expires_at - now_s
        if key.expires_at and left_s < SOON_S:
            left = f"{left_s / 86_400:.1f} days"
            warnings.append(f"key {key.key_id} of tenant {key.tenant} ends in {left}")
    if config.jwt is None:
        without = {tenant.name for tenant in config.tenants} - {key.tenant for key in live}
        warnings += [f"tenant {name} has no key in force" for name in sorted(without)]
    return warnings
