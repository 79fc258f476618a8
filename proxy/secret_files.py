"""A secret that the environment names a file of, in place of holding it.

An environment is shown to whoever may look at the process or the container (`docker inspect`,
`systemctl show`), and each child inherits it. So what `DOHERTY_X` says may also stand in the file
that `DOHERTY_X_FILE` names: the form in which Docker's and Kubernetes' secrets and systemd's
credentials come.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from proxy.config_reading import ConfigError

SUFFIX = "_FILE"
SECRET_BYTES_MAX = 16 * 1024


def variable(environment: Mapping[str, str], name: str, *, secret: bool) -> str | None:
    """Return the variable, or what is in the file that its twin names, without the last line end.

    Raises `ConfigError`.
    """
    said = environment.get(name)
    twin = name + SUFFIX
    if not secret or not environment.get(twin):  # a template may leave it empty
        return said
    if said is not None:
        raise ConfigError(f"{name} and {twin} are both set; unset one of them")
    return _content(twin, environment[twin])


def is_secret(field: str) -> bool:
    """Say whether a field of the configuration is one that may stand in a file of its own."""
    return field.endswith("_key") or field == "store"  # the URL of a store may hold a password


def _content(name: str, path: str) -> str:
    try:
        # Without waiting for whoever writes a FIFO: nobody may, and the proxy would never start.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                # What is read once is gone at the next reload.
                raise ConfigError(f"{name}: {path} is no regular file; write the secret into one")
            text = file.read(SECRET_BYTES_MAX + 1).decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error}") from error
    if not text:  # an empty key would open what it should close
        raise ConfigError(f"{name}: {path} is empty; write the secret there, or unset {name}")
    if len(text) > SECRET_BYTES_MAX:
        raise ConfigError(f"{name}: {path} is longer than {SECRET_BYTES_MAX} bytes: no secret is")
    return text
