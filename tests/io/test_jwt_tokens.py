"""Tokens: the right ones are taken, and every known way to pass off a wrong one is not."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config import JwtConfig
from proxy.config_access import Algorithm
from proxy.io.jwt_tokens import BadTokenError, Jwks, UnknownKeyError
from tests.fakes import provider_of_tokens as provider
from tests.fakes.provider_of_tokens import AUDIENCE, EC, OTHER_RSA, RSA, jwk, jwks

ISSUER = "https://issuer.example"
NOW_S = 1_800_000_000.0
CONFIG = JwtConfig(issuer=ISSUER, audience=AUDIENCE, leeway_secs=30)
KEYS = Jwks(CONFIG, jwks(jwk(RSA, "one"), jwk(EC, "two")))


def claims(**more: object) -> dict[str, object]:
    return provider.claims(ISSUER, **{"exp": int(NOW_S) + 600, **more})


def token(content: dict[str, object] | None = None, *args: Any, **header: object) -> bytes:
    return provider.token(content or claims(), *args, **header).encode()


def refused(octets: bytes, keys: Jwks = KEYS) -> str:
    with pytest.raises(BadTokenError) as error:
        keys.judge(octets, NOW_S)
    return str(error.value)


def test_right_tokens() -> None:
    got = KEYS.judge(token(), NOW_S)
    assert (got.tenant, got.expires_s) == ("acme", NOW_S + 630)
    assert got.subject.startswith("token-")
    assert "acme" not in got.subject
    assert KEYS.judge(token(claims(), EC, "ES256", kid="two"), NOW_S).tenant == "acme"
    assert KEYS.judge(token(claims(aud=["other", AUDIENCE])), NOW_S).tenant == "acme"
    assert KEYS.judge(token(claims(nbf=NOW_S + 29, iat=NOW_S + 29)), NOW_S).tenant == "acme"
    assert KEYS.judge(token(claims(exp=NOW_S - 29)), NOW_S).tenant == "acme"


@pytest.mark.parametrize(
    ("algorithm", "key"),
    [
        *((name, RSA) for name in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
        ("ES256", EC),
        ("ES384", ec.generate_private_key(ec.SECP384R1())),
        ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
    ],
)
def test_every_algorithm_that_may_be_configured(algorithm: Algorithm, key: Any) -> None:
    shown = token(claims(), key, algorithm)
    document = jwks(jwk(key, "one"))
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, algorithms=(algorithm,))
    assert Jwks(config, document).judge(shown, NOW_S).tenant == "acme"
    other: Algorithm = "RS256" if algorithm != "RS256" else "PS256"
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, algorithms=(other,))
    with pytest.raises((BadTokenError, ValueError), match=r"not taken|holds no key"):
        Jwks(config, document).judge(shown, NOW_S)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (claims(exp=NOW_S - 31), "expired"),
        (claims(exp=None), "lacks"),
        (claims(exp="9999999999"), "no time"),
        (claims(exp=True), "no time"),
        (claims(exp=float("inf")), ""),
        (claims(exp=1e300), "no time"),
        (claims(exp=10**400), "no time"),
        (claims(exp=float("nan")), ""),
        (claims(exp=[1]), "no time"),
        (claims(nbf=NOW_S + 31), "not come yet"),
        (claims(iat=NOW_S + 31), "not come yet"),
        (claims(iat=None, nbf=None, aud=None), "lacks"),
        (claims(aud="other"), "somebody else"),
        (claims(aud=["other"]), "somebody else"),
        (claims(aud=[]), "lacks"),
        (claims(aud={"doherty": 1}), ""),
        (claims(iss=None), "lacks"),
        (claims(iss=ISSUER + "/"), "another issuer"),
        (claims(sub=None), "which tenant"),
        (claims(sub="a" * 129), "which tenant"),
    ],
)
def test_wrong_claims(content: dict[str, object], words: str) -> None:
    assert words in refused(token(content))


def _hmac_with_the_public_key() -> bytes:
    """The public key of RS256, taken for the secret of HS256."""
    unsigned = provider.by_hand({"alg": "HS256", "typ": "JWT", "kid": "one"}, claims())
    signing = unsigned.rpartition(".")[0]
    mac = hmac.new(provider.public_pem(RSA), signing.encode(), hashlib.sha256).digest()
    return provider.by_hand({"alg": "HS256", "typ": "JWT", "kid": "one"}, claims(), mac).encode()


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (_hmac_with_the_public_key(), "a way that is not taken"),
        (provider.by_hand({"alg": "none", "kid": "one"}, claims()).encode(), "is not taken"),
        (provider.by_hand({"alg": "nOnE", "kid": "one"}, claims()).encode(), "is not taken"),
        (provider.by_hand({"kid": "one"}, claims()).encode(), "is not taken"),
        (provider.by_hand({"alg": "RS256", "kid": "one"}, claims()).encode(), "signature"),
        (token(claims(), RSA, "RS512"), "is not taken"),
        (token(claims(), RSA, "PS256"), "is not taken"),
        (token(claims(), OTHER_RSA), "signature is wrong"),
        (token(claims(), RSA, kid="two"), "does not have"),  # the other's, of another kind
        (token(claims(), EC, "ES256", kid="one"), "does not have"),
        (token(claims(), OTHER_RSA, jku="https://evil.example/keys"), "signature"),
        (token(claims(), OTHER_RSA, x5u="https://evil.example/cert"), "signature"),
        (token(claims(), OTHER_RSA, jwk=jwk(OTHER_RSA, "one")), "signature"),
        (token(claims(), OTHER_RSA, x5c=["AAAA"]), "signature"),
        (token(claims(), RSA, crit=["exp"]), "malformed"),
        (
            provider.by_hand(
                {"alg": "RS256", "kid": "one", "crit": ["b64"], "b64": False}, claims()
            ).encode(),
            "malformed",
        ),
        (token(claims(), RSA)[:-8] + b"AAAAAAAA", "signature"),
        (token(claims(), RSA) + b".x.y", "malformed"),
        (b"..", "malformed"),
        (b"a.b.c", "malformed"),
        (b"\xff.\xff.\xff", "malformed"),
        (provider.by_hand({"alg": "RS256", "kid": ["one"]}, claims()).encode(), "malformed"),
    ],
)
def test_forged_tokens(octets: bytes, words: str) -> None:
    assert words in refused(octets)


@pytest.mark.parametrize(
    "kid", ["../../dev/null", "one'--", "one\x00", "/proc/self/environ", "", "ONE"]
)
def test_a_key_is_found_by_its_id_and_by_nothing_like_it(kid: str) -> None:
    with pytest.raises(UnknownKeyError):
        KEYS.judge(token(claims(), RSA, kid=kid), NOW_S)


def test_a_token_may_leave_out_its_key_where_there_is_one() -> None:
    unnamed = token(claims(), RSA, kid=None)
    assert Jwks(CONFIG, jwks(jwk(RSA, "one"))).judge(unnamed, NOW_S).tenant == "acme"
    assert "which key" in refused(unnamed, Jwks(CONFIG, jwks(jwk(RSA, "a"), jwk(OTHER_RSA, "b"))))


def test_depth_is_no_way_to_break_it() -> None:
    import base64

    deep = base64.urlsafe_b64encode(b'{"alg":' + b"[" * 4000).rstrip(b"=")
    assert "malformed" in refused(deep + b".e30.AA")
    assert refused(token({"a": json.loads("[" * 300 + "]" * 300), **claims(aud=None)}))


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4), st.integers(0, 700))
def test_whatever_comes_is_refused_in_order(parts: list[bytes], at: int) -> None:
    with pytest.raises(BadTokenError):
        KEYS.judge(b".".join(parts), NOW_S)
    right = token()
    at = min(at, len(right) - 3)  # the last digits of a signature may hold bits that mean nothing
    altered = right[:at] + (b"A" if right[at : at + 1] != b"A" else b"B") + right[at + 1 :]
    with pytest.raises(BadTokenError):
        KEYS.judge(altered, NOW_S)


@pytest.mark.parametrize(
    ("document", "usable"),
    [
        (jwks(jwk(RSA, "one", use="sig", alg="RS256", key_ops=["verify"])), True),
        (jwks({"kty": "oct", "k": "AAAA", "kid": "x"}, jwk(RSA, "one")), True),
        (jwks({"kty": "RSA", "n": "!", "e": "AQAB", "kid": "x"}, jwk(RSA, "one")), True),
        (jwks(jwk(RSA, "one", use="enc")), False),
        (jwks(jwk(RSA, "one", alg="RS512")), False),
        (jwks(jwk(RSA, "one", key_ops=["encrypt"])), False),
        (jwks(jwk(RSA, "one", d="AAAA")), False),
        (jwks({"kty": "oct", "k": "AAAA", "alg": "RS256", "kid": "one"}), False),
        (jwks(), False),
        (b"{}", False),
        (b"[]", False),
        (b"", False),
        (b'{"keys":' + b"[" * 9000, False),
        (b'{"keys":[' + b"1," * 200_000 + b"1]}", False),
        (b'{"keys":[' + b"{}," * 64 + b"{}]}", False),
    ],
)
def test_which_sets_of_keys_can_be_used(document: bytes, usable: bool) -> None:
    if usable:
        assert Jwks(CONFIG, document).judge(token(), NOW_S).tenant == "acme"
        return
    with pytest.raises(ValueError, match=r"\w"):
        Jwks(CONFIG, document)


@pytest.mark.parametrize(
    ("claim", "content", "tenant"),
    [
        ("org", {"org": "acme"}, "acme"),
        ("realm.org", {"realm": {"org": "acme"}}, "acme"),
        ("https://example.com/org", {"https://example.com/org": "acme"}, "acme"),
        ("realm.org", {"realm.org": "whole", "realm": {"org": "acme"}}, "whole"),
        ("realm.org", {"realm": "acme"}, None),
        ("realm.org", {"realm": ["org"]}, None),
        ("org", {"org": ["acme"]}, None),
        ("org", {"org": ""}, None),
    ],
)
def test_where_the_tenant_stands(claim: str, content: dict[str, Any], tenant: str | None) -> None:
    config = JwtConfig(issuer=ISSUER, audience=AUDIENCE, tenant_claim=claim)
    keys = Jwks(config, jwks(jwk(RSA, "one")))
    octets = token(claims(**content))
    if tenant is None:
        assert "which tenant" in refused(octets, keys)
    else:
        assert keys.judge(octets, NOW_S).tenant == tenant
