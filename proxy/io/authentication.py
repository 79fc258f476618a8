"""Who asks: what a head shows, judged by the keys and the policy of this moment.

Every request is judged, the thousandth on a connection like the first, and whatever was worked out
before for an equal head: so what changes is in force with the next head that comes. What engines
get is settled here, too. Where requests are somebody's in particular, no engine sees what clients
show: it gets the proxy's own key, or none. An engine's log is no place for a tenant's key, and one
engine must not be able to ask another in a tenant's name.
"""

from __future__ import annotations

from typing import Final

from proxy.config import ProxyConfig
from proxy.contract.behalf import PROOF_FIELD, TENANT_FIELD, from_field, in_field, proof_of
from proxy.contract.keys import KeySet
from proxy.core import limits
from proxy.core.preamble import Preamble
from proxy.core.principal import ANYBODY, INTERNAL, Principal
from proxy.core.principals import Principals
from proxy.errors import UnauthorizedError
from proxy.io.clock import Clock

TENANT: Final = TENANT_FIELD.encode()


class Authentication:
    """What one worker knows of those who may ask."""

    def __init__(self, config: ProxyConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._keys: KeySet | None = None  # None: none have been told
        self._work_out()

    def reconfigure(self, config: ProxyConfig) -> None:
        self._config = config
        self._work_out()

    def know_keys(self, keys: KeySet) -> None:
        self._keys = keys
        self._work_out()

    def _work_out(self) -> None:
        access, api_key = self._config.access, self._config.api_key
        awaited = self._config.keys_path is not None or (
            bool(access.tenants) and access.jwt is None
        )
        internal_key = self._config.internal_key
        self.principals = Principals(
            access, self._keys, api_key, awaited=awaited, internal_key=internal_key
        )
        self._behalf: dict[str, Principal] = {}
        # The field that engines get in place of what clients show; None: they get that.
        self.engine_credential: bytes | None = None
        if self.principals.named:
            own = b"authorization: Bearer %b\r\n"
            self.engine_credential = b"" if api_key is None else own % api_key.encode()

    def who_asks(self, preamble: Preamble) -> Principal:
        """Return who shows the credential of this head. Raises `ProxyError`."""
        principals = self.principals
        if not principals.demanded:
            return ANYBODY
        if preamble.credential_problem:
            raise UnauthorizedError(preamble.credential_problem)
        principal = principals.find(preamble.key_digest, self._clock.unix_s())
        if principal is None:
            raise principals.refusal(preamble.key_digest)
        return principal if principal is not INTERNAL else self._on_behalf(preamble)

    def _on_behalf(self, preamble: Preamble) -> Principal:
        """Return whom the offline service asks for; nobody else's word is taken for that."""
        field = preamble.head.get(TENANT)
        if field is None:
            return INTERNAL
        owner = from_field(field.decode("latin-1"))
        principal = self._behalf.get(owner)
        if principal is None:
            if len(self._behalf) >= limits.TENANTS_REMEMBERED_MAX:
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
