"""Tokens of an identity provider: whose they are, and why one is not taken.

Signatures, issuer and audience are verified by PyJWT, which also refuses what a header says must be
understood (`crit`, RFC 7515 §4.1.11). What it leaves open is settled here, after RFC 8725 (JSON Web
Token Best Current Practices): which key may verify which algorithm follows from the provider's keys
and our configuration, and never from the token (§3.1), so a public key is no secret of an HMAC, and
`none` is no algorithm; a key is found by its id among those of the provider alone, and no header
that brings or points at one is read (§3.10). A token has to end (`exp`): none is ever taken back.

One verification costs about as much as a whole request does otherwise, so its outcome is kept by
the digest of the token until it ends: see `io/authentication.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import msgspec

from proxy.config import ConfigError, JwtConfig
from proxy.contract.extras import install_command
from proxy.core import claim_limits

_TENANT_CHARS_MAX: Final = 128
_KINDS: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "EdDSA": "Ed25519"}


class BadTokenError(Exception):
    """The token is not taken; the text says why, in words that hold nothing of it."""


class UnknownKeyError(BadTokenError):
    """It is signed by a key that the provider had not when it was asked last."""


class Claims(msgspec.Struct, frozen=True):
    """What a right token says. `tenant` is what the configured claim holds."""

    tenant: str
    subject: str  # a short digest of who it is, for logs and accounts
    expires_s: float


class Jwks:
    """The keys of a provider, ready to verify what the configuration allows."""

    def __init__(self, config: JwtConfig, document: bytes) -> None:
        """Raises `ValueError` when the document holds no key that could be used."""
        self._jwt = library()
        self._config = config
        self._keys: dict[tuple[str, str], Any] = {}  # by algorithm and id
        self._of_algorithm: dict[str, list[Any]] = {}
        for key in _keys_in(document):
            for algorithm in config.algorithms:
                if _suits(key, algorithm):
                    self._add(key, algorithm)
        if not self._keys:
            raise ValueError("it holds no key for the algorithms " + ", ".join(config.algorithms))

    def _add(self, key: dict[str, Any], algorithm: str) -> None:
        try:
            usable = self._jwt.PyJWK(key, algorithm)
        except (self._jwt.PyJWTError, ValueError, TypeError, KeyError):
            return  # one that is broken spoils no other
        kid = key.get("kid")
        self._keys[algorithm, kid if isinstance(kid, str) else ""] = usable
        self._of_algorithm.setdefault(algorithm, []).append(usable)

    def judge(self, token: bytes, unix_s: float) -> Claims:
        """Return what a right token says. Raises `BadTokenError`."""
        jwt = self._jwt
        try:
            header = jwt.get_unverified_header(token)
            claims = self._verified(token, self._key_for(header))
        except jwt.PyJWTError as error:
            raise BadTokenError(_reason(type(error).__name__)) from None
        except (ValueError, TypeError, RecursionError, OverflowError):
            raise BadTokenError("the token is malformed") from None
        expires_s = self._judge_times(claims, unix_s)
        return Claims(self._tenant(claims), _subject(claims), expires_s)

    def _key_for(self, header: Mapping[str, Any]) -> Any:
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._config.algorithms:
            raise BadTokenError("the token is signed in a way that is not taken here")
        if kid is None:
            candidates = self._of_algorithm.get(algorithm, [])
            if len(candidates) != 1:  # OpenID Connect Core 1.0 §10.1
                raise BadTokenError("the token does not say which key it is signed by")
            return candidates[0]
        key = self._keys.get((algorithm, kid))
        if key is None:
            raise UnknownKeyError("the token is signed by a key that its provider does not have")
        return key

    def _verified(self, token: bytes, key: Any) -> dict[str, Any]:
        config = self._config
        claims: dict[str, Any] = self._jwt.decode(
            token,
            key,
            algorithms=list(config.algorithms),
            audience=config.audience,
            issuer=config.issuer,
            options={
                "require": ["exp", "iss", "aud"],
                "enforce_minimum_key_length": True,
                # By our clock, below, which is the one that ends what is kept of them.
                **dict.fromkeys(("verify_exp", "verify_nbf", "verify_iat"), False),
            },
        )
        return claims

    def _judge_times(self, claims: Mapping[str, Any], unix_s: float) -> float:
        """RFC 7519 §4.1.4 to §4.1.6; return when it ends."""
        leeway_s = self._config.leeway_secs
        expires_s = _time(claims, "exp") + leeway_s
        if unix_s >= expires_s:
            raise BadTokenError("the token has expired")
        for name in ("nbf", "iat"):
            if name in claims and _time(claims, name) > unix_s + leeway_s:
                raise BadTokenError("the token is of a time that has not come yet")
        return expires_s

    def _tenant(self, claims: Mapping[str, Any]) -> str:
        """Return what the claim holds; a name with dots is that of a claim first, then a way."""
        name = self._config.tenant_claim
        value: Any = claims.get(name)
        if value is None:
            value = claims
            for step in name.split("."):
                value = value.get(step) if isinstance(value, dict) else None
        if not isinstance(value, str) or not 0 < len(value) <= _TENANT_CHARS_MAX:
            raise BadTokenError("the token does not say which tenant it is of")
        return value


def library() -> Any:
    """Return PyJWT. Raises `ConfigError` where it is not installed."""
    try:
        import cryptography  # noqa: F401, PLC0415 - an extra: most proxies do without
        import jwt  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"jwt: tokens are verified by PyJWT; install it: {install_command('jwt')}"
        ) from error
    return jwt


def _keys_in(document: bytes) -> list[dict[str, Any]]:
    if len(document) > claim_limits.JWKS_BYTES_MAX:
        raise ValueError(f"it is over {claim_limits.JWKS_BYTES_MAX} octets")
    try:
        keys = msgspec.json.decode(document)["keys"]
    except (msgspec.MsgspecError, KeyError, TypeError, RecursionError):
        raise ValueError("it is no set of keys in JSON (RFC 7517 §5)") from None
    if not isinstance(keys, list) or len(keys) > claim_limits.JWKS_KEYS_MAX:
        raise ValueError(f"its keys are no list of at most {claim_limits.JWKS_KEYS_MAX}")
    return [key for key in keys if isinstance(key, dict)]


def _suits(key: Mapping[str, Any], algorithm: str) -> bool:
    """RFC 7517 §4.1 to §4.4: what kind of key it is, and what its owner made it for."""
    if key.get("kty") != _KINDS[algorithm[:2]]:
        return False
    if algorithm in _CURVES and key.get("crv") != _CURVES[algorithm]:
        return False
    if key.get("use", "sig") != "sig" or "d" in key:  # a private key was published by mistake
        return False
    operations = key.get("key_ops")
    if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
        return False
    return bool(key.get("alg", algorithm) == algorithm)


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadTokenError(f"the token's {name} is no time")
    if not abs(value) <= claim_limits.UNIX_S_MAX:  # nor is NaN; and no float has some integers
        raise BadTokenError(f"the token's {name} is no time")
    return float(value)


def _subject(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str):
        return "token"
    return "token-" + sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _reason(kind: str) -> str:
    return {
        "InvalidSignatureError": "the token's signature is wrong",
        "InvalidIssuerError": "the token is of another issuer",
        "InvalidAudienceError": "the token is for somebody else (aud)",
        "MissingRequiredClaimError": "the token lacks one of exp, iss and aud",
    }.get(kind, "the token is malformed")
