"""An identity provider: keys that rotate, tokens of any kind, and the pages that it is asked."""

from __future__ import annotations

import base64
import json
import time
from typing import Any, Self

import jwt
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

AUDIENCE = "doherty"

# Made once: a key takes longer than all that is done with it.
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


def public_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def jwk(key: Any, kid: str | None = None, **more: object) -> dict[str, object]:
    kind: Any = jwt.algorithms.OKPAlgorithm
    if isinstance(key, rsa.RSAPrivateKey):
        kind = jwt.algorithms.RSAAlgorithm
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        kind = jwt.algorithms.ECAlgorithm
    made = kind.to_jwk(key.public_key(), as_dict=True)
    return {**made, **({} if kid is None else {"kid": kid}), **more}


def jwks(*keys: dict[str, object]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims(issuer: str, **more: object) -> dict[str, object]:
    """Return right ones; None takes one out."""
    made = {"iss": issuer, "aud": AUDIENCE, "sub": "acme", "exp": int(time.time()) + 600, **more}
    return {name: value for name, value in made.items() if value is not None}


def token(
    content: dict[str, object], key: Any = RSA, algorithm: str = "RS256", **header: object
) -> str:
    whole = {"kid": "one", **header}
    headers = {name: value for name, value in whole.items() if value is not None}
    return jwt.encode(content, key, algorithm=algorithm, headers=headers)


def by_hand(header: dict[str, object], content: dict[str, object], signature: bytes = b"") -> str:
    """Return a token that no library would make."""
    parts = (json.dumps(header).encode(), json.dumps(content).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


class TokenProvider:
    """Use as `async with TokenProvider() as provider`."""

    def __init__(self) -> None:
        self.document = jwks(jwk(RSA, "one"))
        self.status = 200
        self.asked = 0
        self.says_issuer = ""  # its own URL
        self.uri = ""  # its own page
        self._runner: web.AppRunner

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/.well-known/openid-configuration", self._discovery)
        app.router.add_get("/keys", self._keys)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.issuer = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _discovery(self, _: web.Request) -> web.Response:
        uri = self.uri or f"{self.issuer}/keys"
        return web.json_response({"issuer": self.says_issuer or self.issuer, "jwks_uri": uri})

    async def _keys(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.Response(body=self.document, status=self.status)

    def token(self, tenant: str = "acme", key: Any = RSA, kid: str = "one") -> str:
        return token(claims(self.issuer, sub=tenant), key, kid=kid)
