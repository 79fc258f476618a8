"""What a new reading of the configuration means for a proxy that runs."""

from __future__ import annotations

import msgspec
import pytest

from proxy import settings
from proxy.config import ProxyConfig

RUNNING = ProxyConfig(port=8000, workers=2, policy="prefix", api_key="old")


@pytest.mark.parametrize("name", settings.FIXED)
def test_what_is_bound_to_the_process_waits(name: str) -> None:
    other = {"host": "::1", "admin_host": "::1", "admin_api_key": "k", "upgrade_socket": "u"}
    read = msgspec.structs.replace(RUNNING, **{name: other.get(name, 9)})
    change = settings.change(RUNNING, read)
    assert change == settings.Change(RUNNING, (), (name,))


def test_the_rest_goes_into_force() -> None:
    read = msgspec.structs.replace(RUNNING, port=9, policy="random", api_key="new")
    change = settings.change(RUNNING, read)
    assert change.changed == ("policy", "api_key")
    assert change.waiting == ("port",)
    assert change.config == msgspec.structs.replace(read, port=8000)


def test_nothing_is_nothing() -> None:
    assert settings.change(RUNNING, RUNNING) == settings.Change(RUNNING, (), ())
