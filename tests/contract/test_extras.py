"""The command that installs an optional part."""

import sys
from pathlib import Path

import pytest

from proxy.contract import extras
from proxy.contract.extras import install_command

CHECKOUT = Path(__file__).resolve().parents[2]


def test_it_names_the_python_that_lacks_it_and_this_checkout() -> None:
    assert install_command("otel") == f"{sys.executable} -m pip install -e '{CHECKOUT}[otel]'"


def test_of_an_installed_package_it_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "__file__", "/opt/doherty/lib/proxy/contract/extras.py")
    assert install_command("otel") == f"{sys.executable} -m pip install 'doherty[otel]'"
