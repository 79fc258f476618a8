"""Who asks: what a head shows, judged by the keys and the policy of this moment.

Every request is judged, the thousandth on a connection like the first, and whatever was worked out
before for an equal head: so what changes is in force with the next head that comes. What engines
get is settled here, too. Where requests are somebody's in particular, no engine sees what clients
show: it gets the proxy's own key, or none. An engine's log is no place for a tenant's key, and one
engine must not be able to ask another in a tenant's name.
"""

from __future__ import annotations

from proxy.config import ProxyConfig
from proxy.contract.keys import KeySet
from proxy.core.preamble import Preamble
from proxy.core.principal import ANYBODY, Principal
from proxy.core.principals import Principals
from proxy.errors import UnauthorizedError
from proxy.io.clock import Clock


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
        self.principals = Principals(access, self._keys, api_key, awaited=awaited)
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
        return principal
