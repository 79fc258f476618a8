"""Who asks, and all that he may: a key or token and its tenant's policy, laid over each other.

Worked out once for each key when keys or configuration change, so that a request costs one look-up
by the digest of what it presented. A key can only be allowed less than its tenant.
"""

from __future__ import annotations

from typing import Final

from proxy.core.classes import NAMES, UNSAID

ALL_CLASSES: Final = (1 << len(NAMES)) - 1


class Principal:
    """One key or token, ready to be asked. It is never changed; a new reading makes a new one."""

    __slots__ = (
        "classes", "crossed", "default_class", "expires_s", "isolated", "key_id", "limited",
        "models", "narrowed",
        "owner", "rated", "regions", "salt", "slo_ttft_s", "tenant", "weight",
    )  # fmt: skip

    def __init__(self, tenant: str = "", key_id: str = "") -> None:
        """One who may do everything, without limit; `""` is nobody's key in particular."""
        self.tenant = tenant
        self.key_id = key_id
        self.owner = tenant  # whose its files and cached prefixes are
        self.weight = 1.0
        self.default_class = UNSAID
        self.classes = ALL_CLASSES  # bits of those that may be asked for
        self.models: frozenset[str] | None = None  # None: all
        self.regions: frozenset[str] | None = None  # None: all
        self.narrowed = False  # its key may ask for less than its tenant
        self.isolated = False
        self.salt = ""  # of its cached prefixes in engines; empty: shared with others
        self.slo_ttft_s = 0.0  # 0: none said
        self.expires_s = 0.0  # Unix time; 0: never
        self.crossed = False  # another region has admitted and counts it: nothing is counted here
        self.rated = True  # its requests count for the limits of a minute; lines of jobs do not
        self.limited = False  # something of its tenant is counted before it is let in


# The offline service, which sends lines of jobs; it says on whose behalf.
INTERNAL: Final = Principal("", "internal")
# Where no key is demanded, or one that is nobody's in particular.
ANYBODY: Final = Principal()
