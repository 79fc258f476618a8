"""What is said of certificates and settings that cannot be used, before anything is served."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from backends.cli import main
from proxy import tls
from proxy.config import ConfigError, ProxyConfig
from tests.fakes.certificates import Authority

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    authority.issue("good")
    authority.issue("other")
    authority.issue("old", expired=True)
    (folder / "text.pem").write_text("hello")
    torn = (folder / "good.cert.pem").read_text()[:300] + "\n-----END CERTIFICATE-----\n"
    (folder / "torn.pem").write_text(torn)
    key = serialization.load_pem_private_key((folder / "good.key.pem").read_bytes(), None)
    (folder / "locked.key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hush"),
        )
    )
    return folder


GOOD = {"tls_cert_path": "good.cert.pem", "tls_key_path": "good.key.pem"}
FAULTS = {
    "no key": ({"tls_cert_path": "good.cert.pem"}, "tls_key_path: is missing; tls_cert_path"),
    "no certificate": ({"tls_key_path": "good.key.pem"}, "tls_cert_path: is missing"),
    "no file": (GOOD | {"tls_cert_path": "none.pem"}, "none.pem cannot be read: No such file"),
    "no key file": (GOOD | {"tls_key_path": "none.pem"}, "tls_key_path: .*none.pem cannot be read"),
    "a folder": (GOOD | {"tls_cert_path": "."}, "tls_cert_path: .* cannot be read: Is a directory"),
    "no PEM": (GOOD | {"tls_cert_path": "text.pem"}, "text.pem holds no certificate in PEM form"),
    "torn": (GOOD | {"tls_cert_path": "torn.pem"}, "torn.pem and .* cannot be used: "),
    "key is no key": (GOOD | {"tls_key_path": "good.cert.pem"}, "holds no private key in PEM"),
    "other's key": (GOOD | {"tls_key_path": "other.key.pem"}, "other.key.pem is not that of the"),
    "locked": (GOOD | {"tls_key_path": "locked.key.pem"}, "locked.key.pem is encrypted"),
    "clients without CA": (GOOD | {"tls_client_auth": "required"}, "tls_client_ca_path must name"),
    "clients without TLS": ({"tls_client_auth": "optional"}, "client certificates need tls_cert"),
    "CA without clients": (GOOD | {"tls_client_ca_path": "ca.pem"}, "set tls_client_auth to"),
    "CA is none": (
        GOOD | {"tls_client_ca_path": "text.pem", "tls_client_auth": "optional"},
        "tls_client_ca_path: .*text.pem holds no certificate",
    ),
    "no replica CA": ({"ca_cert_path": "none.pem"}, "ca_cert_path: .*none.pem cannot be read"),
    "CA for nothing": (
        {"ca_cert_path": "ca.pem", "verify_replica_tls": False},
        "ca_cert_path: nothing is verified without",
    ),
    "half a pair": ({"client_cert_path": "good.cert.pem"}, "client_key_path: is missing"),
    "wrong pair": (
        {"client_cert_path": "good.cert.pem", "client_key_path": "other.key.pem"},
        "client_key_path: the key in .* is not that",
    ),
}


def settings(folder: Path, given: dict[str, object]) -> dict[str, object]:
    """Return `given` with its files in `folder`."""
    return {k: str(folder / v) if k.endswith("path") else v for k, v in given.items()}


@pytest.mark.parametrize("name", list(FAULTS))
def test_what_cannot_be_used_says_which_setting_and_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    given, message = FAULTS[name]
    config = ProxyConfig(**settings(folder, given))
    with pytest.raises(ConfigError, match=message):
        tls.check(config, NOW)
    file = tmp_path / "doherty.yaml"
    lines = [f"  {k}: {v}\n".replace("False", "false") for k, v in settings(folder, given).items()]
    file.write_text("proxy:\n" + "".join(lines))
    assert main(["check", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_good_ones_make_contexts(folder: Path) -> None:
    given = GOOD | {
        "tls_client_ca_path": "ca.pem",
        "tls_client_auth": "optional",
        "ca_cert_path": "ca.pem",
        "client_cert_path": "other.cert.pem",
        "client_key_path": "other.key.pem",
    }
    config = ProxyConfig(**settings(folder, given))
    assert tls.check(config, NOW) == []
    assert len(tls.files(config)) == 6
    assert tls.server_context(ProxyConfig()) is None
    assert tls.replica_context(ProxyConfig()).check_hostname


def test_a_certificate_out_of_its_time_is_a_warning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"tls_cert_path": "old.cert.pem", "tls_key_path": "old.key.pem"}
    config = ProxyConfig(**settings(folder, pair))
    (warning,) = tls.check(config, NOW)
    assert "old.cert.pem expired on" in warning
    assert warning.startswith("tls_cert_path: ")
    (early,) = tls.check(config, NOW - timedelta(days=90))
    assert "is not valid before" in early
    file = tmp_path / "doherty.yaml"
    file.write_text(f"proxy: {settings(folder, pair)}\n")
    assert main(["check", str(file)]) == 0
    said = capsys.readouterr()
    assert "warning: tls_cert_path: " in said.err
    assert ": ok\n" in said.out


def test_validity_is_what_another_reader_says(folder: Path) -> None:
    for name in ("ca.pem", "old.cert.pem"):
        pem = (folder / name).read_text()
        known = x509.load_pem_x509_certificate(pem.encode())
        end = pem.index("-----END CERTIFICATE-----") + len("-----END CERTIFICATE-----")
        read = tls.validity(ssl.PEM_cert_to_DER_cert(pem[:end] + "\n"))
        assert read == (known.not_valid_before_utc, known.not_valid_after_utc)
