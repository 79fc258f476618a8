"""TLS contexts made from the configuration, and words for what is wrong with certificates.

Both listeners of trust are here: what we show to clients and ask of them, and what we ask of
replicas and show to them. TLS 1.2 is the least (RFC 8996 retires the rest) and HTTP/1.1 the only
protocol offered (ALPN, RFC 7301). Everything that a person can put right is a `ConfigError` that
names the setting, so that `doherty check`, a start and a reload say the same.

Imports only the configuration; the command line reads it too.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from proxy.config import ConfigError, ProxyConfig

SHOWN: Final = ("tls_cert_path", "client_cert_path")  # to clients, and to replicas
_ALPN: Final = ["http/1.1"]
_VERIFY: Final = {
    "off": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17  # DER tags (X.690 §8.1.2, RFC 5280 §4.1)


def server_context(config: ProxyConfig) -> ssl.SSLContext | None:
    """Return what the listener speaks; None for plain HTTP. Raises `ConfigError`."""
    _check_pair(config, "tls_cert_path", "tls_key_path")
    if config.tls_cert_path is None:
        if config.tls_client_auth != "off":
            raise ConfigError("tls_client_auth: client certificates need tls_cert_path")
        return None
    if config.tls_client_auth != "off" and config.tls_client_ca_path is None:
        raise ConfigError("tls_client_auth: tls_client_ca_path must name who issues certificates")
    if config.tls_client_auth == "off" and config.tls_client_ca_path is not None:
        raise ConfigError("tls_client_ca_path: set tls_client_auth to optional or required")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A client that renegotiates makes us do the costly half of a handshake as often as it likes.
    context.options |= ssl.OP_NO_RENEGOTIATION
    _restrict(context)
    _load_pair(context, config, "tls_cert_path", "tls_key_path")
    if config.tls_client_ca_path is not None:
        _load_authorities(context, config, "tls_client_ca_path")
        context.verify_mode = _VERIFY[config.tls_client_auth]
    return context


def replica_context(config: ProxyConfig) -> ssl.SSLContext:
    """Return what is spoken to replicas with https URLs. Raises `ConfigError`.

    A replica must be who its URL says, by the authorities of `ca_cert_path` or the system's.
    """
    _check_pair(config, "client_cert_path", "client_key_path")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies, host name included
    _restrict(context)
    if not config.verify_replica_tls:
        if config.ca_cert_path is not None:
            raise ConfigError("ca_cert_path: nothing is verified without verify_replica_tls")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif config.ca_cert_path is not None:
        _load_authorities(context, config, "ca_cert_path")
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    _load_pair(context, config, "client_cert_path", "client_key_path")
    return context


def check(config: ProxyConfig, now: datetime) -> list[str]:
    """Return warnings about the certificates. Raises `ConfigError` when they cannot be used."""
    server_context(config)
    replica_context(config)
    return [
        f"{name}: the certificate in {path} {problem}"
        for name in SHOWN
        if (path := getattr(config, name)) is not None
        for problem in _validity_problems(path, now)
    ]


def ends(config: ProxyConfig) -> dict[str, datetime]:
    """Return until when the certificates hold that this proxy shows, by the setting."""
    found = {}
    for name in SHOWN:
        path = getattr(config, name)
        if path is not None and (period := _period(path)) is not None:
            found[name] = period[1]
    return found


def files(config: ProxyConfig) -> tuple[str, ...]:
    """Return the files that contexts are made of."""
    named = (
        *(config.tls_cert_path, config.tls_key_path, config.tls_client_ca_path),
        *(config.ca_cert_path, config.client_cert_path, config.client_key_path),
    )
    return tuple(path for path in named if path is not None)


def explain(error: BaseException) -> str:
    """Say why a TLS session with a replica was not made, or ended."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or ""
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNSUPPORTED_PROTOCOL"):
            return f"it does not speak TLS as we do ({_words(reason)})"
        return f"TLS: {_words(reason) or type(error).__name__}"
    return type(error).__name__


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(_ALPN)


def _check_pair(config: ProxyConfig, cert: str, key: str) -> None:
    for one, other in ((cert, key), (key, cert)):
        if getattr(config, one) is None and getattr(config, other) is not None:
            raise ConfigError(f"{one}: is missing; {other} is of no use without it")


class _Encrypted(Exception):  # noqa: N818 - never leaves this module
    """OpenSSL asked for a password."""


def _refuse_password() -> str:
    raise _Encrypted


def _load_pair(context: ssl.SSLContext, config: ProxyConfig, cert: str, key: str) -> None:
    cert_path, key_path = getattr(config, cert), getattr(config, key)
    if cert_path is None:
        return
    if "BEGIN CERTIFICATE" not in _read(cert_path, cert):
        raise ConfigError(f"{cert}: {cert_path} holds no certificate in PEM form")
    if "PRIVATE KEY" not in _read(key_path, key):
        raise ConfigError(f"{key}: {key_path} holds no private key in PEM form")
    try:
        context.load_cert_chain(cert_path, key_path, password=_refuse_password)
    except _Encrypted:
        raise ConfigError(
            f"{key}: {key_path} is encrypted, and nobody is here to type its password; "
            f"store it without one (openssl pkey -in {key_path}), readable by this user alone"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"the key in {key_path} is not that of the certificate in {cert_path}"
        else:
            problem = f"{cert_path} and {key_path} cannot be used: {_words(error.reason or '')}"
        raise ConfigError(f"{key}: {problem}") from error


def _load_authorities(context: ssl.SSLContext, config: ProxyConfig, name: str) -> None:
    path = getattr(config, name)
    _read(path, name)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"{name}: {path} holds no certificate in PEM form") from error


def _read(path: str, name: str) -> str:
    try:
        with open(path, encoding="latin-1") as file:
            return file.read()
    except OSError as error:
        problem = error.strerror or type(error).__name__
        raise ConfigError(f"{name}: {path} cannot be read: {problem}") from error


# --- how long a certificate holds -----------------------------------------------------------------


def _validity_problems(path: str, now: datetime) -> Iterator[str]:
    period = _period(path)
    if period is None:
        return  # OpenSSL has taken it; what is unusual about it is not ours to judge
    begins, over = period
    if now < begins:
        yield f"is not valid before {begins:%Y-%m-%d %H:%M} UTC"
    if now > over:
        yield f"expired on {over:%Y-%m-%d %H:%M} UTC"


def _period(path: str) -> tuple[datetime, datetime] | None:
    """Return since when and until when the first certificate in a file holds, if it says so."""
    text = _read(path, path)
    try:
        start = text.index("-----BEGIN CERTIFICATE-----")
        end = text.find("-----END CERTIFICATE-----", start) + len("-----END CERTIFICATE-----")
        return validity(ssl.PEM_cert_to_DER_cert(text[start:end] + "\n"))
    except (ValueError, IndexError):
        return None


def validity(der: bytes) -> tuple[datetime, datetime]:
    """Return since when and until when a certificate is valid (RFC 5280 §4.1.2.5)."""
    _, certificate, _ = _element(der)
    _, signed, _ = _element(certificate)
    tag, _, rest = _element(signed)
    before_validity = 3 if tag == _VERSION else 2  # (version) serial, algorithm, issuer
    for _ in range(before_validity):
        tag, _, rest = _element(rest)
    tag, period, _ = _element(rest)
    if tag != _SEQUENCE:
        raise ValueError("no validity where it should be")
    first, begins, others = _element(period)
    second, ends, _ = _element(others)
    return _time(first, begins), _time(second, ends)


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Return tag and content of the first element, and what follows it."""
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    return der[0], der[start : start + size], der[start + size :]


def _time(tag: int, text: bytes) -> datetime:
    digits = text.decode("ascii")
    if tag == _UTC_TIME:  # two digits of the year; 50 is 1950
        digits = ("19" if digits >= "5" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
