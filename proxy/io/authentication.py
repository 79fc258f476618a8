"""Who asks: what a head shows, judged by the keys and the policy of this moment.

Every request is judged, the thousandth on a connection like the first, and whatever was worked out
before for an equal head: so what changes is in force with the next head that comes. What engines
get is settled here, too. Where requests are somebody's in particular, no engine sees what clients
show: it gets the proxy's own key, or none. An engine's log is no place for a tenant's key, and one
engine must not be able to ask another in a tenant's name.

A token of an identity provider is verified once and remembered by its digest until it ends. All of
them are forgotten when keys, the provider's keys or the configuration change, and so is who stood
for them. Which are wrong is not remembered: there are as many of these as somebody likes to send.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Final

from proxy.config import ProxyConfig
from proxy.contract.behalf import PROOF_FIELD, TENANT_FIELD, from_field, in_field, proof_of
from proxy.contract.keys import KeySet
from proxy.core import claim_limits
from proxy.core.credentials import read_credential
from proxy.core.preamble import Preamble
from proxy.core.principal import ANYBODY, INTERNAL, Principal
from proxy.core.principals import Principals
from proxy.errors import KeysUnknownError, ProxyError, UnauthorizedError
from proxy.io.clock import Clock
from proxy.io.jwt_tokens import BadTokenError, Jwks, UnknownKeyError

# After a token has named an unknown key: its client is told to come again for so long, and the
# provider is not asked once more before so long.
PATIENCE_S: Final = 5.0
ASK_INTERVAL_S: Final = 10.0

TENANT: Final = TENANT_FIELD.encode()


class Authentication:
    """What one worker knows of those who may ask."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._keys: KeySet | None = None  # None: none have been told
        self._jwks: Jwks | None = None  # None: there are none, or they are not known
        self._tokens: dict[bytes, tuple[bytes, Principal]] = {}  # verified, by digest
        self._asked_s = -ASK_INTERVAL_S  # when keys of the provider were asked for
        self.on_unknown_key: Callable[[], None] = _nobody_hears
        self._work_out()

    def reconfigure(self, config: ProxyConfig) -> None:
        if config.access.jwt != self._config.access.jwt:
            self._jwks = None
        self._config = config
        self._work_out()

    def know_jwt_keys(self, document: bytes) -> None:
        """Empty: there are none. Raises `ValueError` when none can be used; nothing changes."""
        jwt = self._config.access.jwt
        self._jwks = Jwks(jwt, document) if jwt is not None and document else None
        self._work_out()

    @property
    def complete(self) -> bool:
        """Whether all is known by which requests are judged."""
        jwks = self._config.access.jwt is None or self._jwks is not None
        return jwks and self.principals.complete

    def know_keys(self, keys: KeySet) -> None:
        self._keys = keys
        self._work_out()

    def _work_out(self) -> None:
        self._tokens.clear()
        access, api_key = self._config.access, self._config.api_key
        # Without a file or a manager, nobody will ever tell of any.
        told = access.jwt is None and self._config.manager_url is not None and access.tenants
        self.principals = Principals(
            access,
            self._keys,
            api_key,
            awaited=self._config.keys_path is not None or bool(told),
            internal_key=self._config.internal_key,
            secret=self._config.peer_key or api_key or "",
        )
        self._behalf: dict[str, Principal] = {}
        # The field that engines get in place of what clients show; None: they get that.
        self.engine_credential: bytes | None = None
        # Nor does one see the secret that is between us and the offline service.
        if self.principals.named or self._config.internal_key is not None:
            own, field = self.principals.own_key, b"authorization: Bearer %b\r\n"
            self.engine_credential = b"" if own is None else field % own.encode()

    def who_asks(self, preamble: Preamble) -> Principal:
        """Return who shows the credential of this head. Raises `ProxyError`."""
        principals = self.principals
        if not principals.demanded:
            return ANYBODY
        if preamble.credential_problem:
            raise UnauthorizedError(preamble.credential_problem)
        unix_s = self._clock.unix_s()
        principal = principals.find(preamble.key_digest, unix_s)
        if principal is not None:
            return principal if principal is not INTERNAL else self._on_behalf(preamble)
        if self._config.access.jwt is None:
            raise principals.refusal(preamble.key_digest)
        return self._who_stands_for(preamble, unix_s)

    # --- the offline service ----------------------------------------------------------------

    def _on_behalf(self, preamble: Preamble) -> Principal:
        """Return whom the offline service asks for; nobody else's word is taken for that."""
        field = preamble.head.get(TENANT)
        if field is None:
            return INTERNAL
        owner = from_field(field.decode("latin-1"))
        principal = self._behalf.get(owner)
        if principal is None:
            if len(self._behalf) >= claim_limits.TENANTS_REMEMBERED_MAX:
                self._behalf.clear()
            principal = self._behalf[owner] = self.principals.on_behalf(owner)
        return principal

    def passed_credential(self, principal: Principal) -> bytes | None:
        """Return the fields by which the offline service knows who asks; None: as the client's."""
        if not principal.owner:
            return None
        owner = principal.owner
        credential = self.principals.derived("offline", owner)
        fields = f"authorization: Bearer {credential}\r\n"
        if (key := self._config.internal_key) is not None:
            fields += f"{TENANT_FIELD}: {in_field(owner)}\r\n"
            fields += f"{PROOF_FIELD}: {proof_of(key, credential, owner)}\r\n"
        return fields.encode()

    # --- tokens of an identity provider ------------------------------------------------------

    def _who_stands_for(self, preamble: Preamble, unix_s: float) -> Principal:
        """Return whom a token names, verified now or before. Raises `ProxyError`."""
        digest = preamble.key_digest
        known = self._tokens.get(digest)
        if known is not None and hmac.compare_digest(digest, known[0]):
            if unix_s < known[1].expires_s:
                return known[1]
            del self._tokens[digest]
        token, _ = read_credential(preamble.head)
        if token.count(b".") != 2:  # no JWS in its compact form (RFC 7515 §7.1)
            raise self.principals.refusal(digest)
        if self._jwks is None:
            raise KeysUnknownError("this proxy does not know yet which keys sign tokens")
        try:
            principal = self._verified(self._jwks, token, unix_s)
        except UnknownKeyError as error:
            raise self._about_unknown_key(error) from None
        except BadTokenError as error:
            raise UnauthorizedError(str(error)) from None
        if len(self._tokens) >= claim_limits.TOKENS_REMEMBERED_MAX:
            self._tokens.clear()  # those in use are back within a few requests
        self._tokens[digest] = (digest, principal)
        return principal

    def _verified(self, jwks: Jwks, token: bytes, unix_s: float) -> Principal:
        jwt = self._config.access.jwt
        assert jwt is not None
        claims = jwks.judge(token, unix_s)
        unknown = jwt.unknown_tenants == "default"
        principal = self.principals.of_tenant(claims.tenant, claims.subject, unknown=unknown)
        if principal is None:
            raise BadTokenError("the token is of a tenant that is not configured here")
        principal.expires_s = claims.expires_s
        return principal

    def _about_unknown_key(self, error: UnknownKeyError) -> ProxyError:
        """A provider that rotates its keys signs with new ones: ask for them, but not for ever."""
        now_s = self._clock.now_s()
        if now_s - self._asked_s >= ASK_INTERVAL_S:
            self._asked_s = now_s
            self.on_unknown_key()
        if now_s - self._asked_s < PATIENCE_S:
            return KeysUnknownError(f"{error}; it is being asked again")
        return UnauthorizedError(str(error))


def _nobody_hears() -> None:
    """A plane without a supervisor: in tests, and before it is connected."""
