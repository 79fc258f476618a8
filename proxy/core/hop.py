"""One request's way from a region to another: what the first proxy says of it, signed.

The proxy that a client has come to has judged who asks and what he may. It says so in one field of
the head, and whoever has the key that both regions share believes it (HMAC, RFC 2104, over
SHA-256). Signed with the claims are method and target, the digest of the body, the life of the
proxy that it is for, the time and a number that is never used again: so a field that was seen on
its way is good for no other request, no other proxy, no later moment, and no second time. The
client's own credentials do not cross.

A request crosses once at most. The field itself forbids a second hop; and since a request that has
lost the field would be an ordinary one, every hop leaves its region in `via` (RFC 9110 §7.6.3), by
which a loop through whatever stands between is found.

Read totally: whatever comes, claims or `HopError`, whose text says why and repeats nothing.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, urlsafe_b64encode
from binascii import Error as NotBase64
from hashlib import blake2b
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from proxy.config_access import WEIGHT_MIN
from proxy.core import claim_limits, limits
from proxy.core.classes import NAMES, UNSAID
from proxy.core.peer_wire import PROXY_ID_BYTES

REGION: Final = b"x-doherty-region"
REFUSED: Final = b"refused"  # what an answer says in `HOP` where a hop was not taken
MOVED: Final = b"moved"  # or where it was for an earlier life of the proxy that is there
NONCE_BYTES: Final = 16
DIGEST_BYTES: Final = 32

_VERSION: Final = b"v1"
_PURPOSE: Final = b"doherty hop v1\0"
_PSEUDONYM: Final = b"doherty-"

_Text = Annotated[str, Meta(max_length=128)]
_Life = Annotated[bytes, Meta(min_length=PROXY_ID_BYTES, max_length=PROXY_ID_BYTES)]


class HopError(Exception):
    """It is not to be believed; the text says why, in a word for the books first."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """What the first proxy says of a request. A later version may add to the end."""

    request_id: _Text
    origin: _Text  # its region
    origin_id: _Life
    region: _Text  # that it is for
    proxy_id: _Life
    unix_s: Annotated[float, Meta(ge=0, le=1e11)]
    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    body_digest: Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    tenant: _Text = ""
    key_id: _Text = ""
    weight: Annotated[float, Meta(ge=WEIGHT_MIN, le=limits.NOTE_WEIGHT_MAX)] = 1.0
    work_class: Annotated[int, Meta(ge=UNSAID, lt=len(NAMES))] = UNSAID
    regions: Annotated[list[_Text], Meta(max_length=claim_limits.HOP_REGIONS_MAX)] | None = None
    deadline_s: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None  # that are left
    tpot_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0
    isolated: bool = False
    salt: _Text = ""
    # Until whoever asks has no patience left.
    listens_s: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None


_decoder: Final = msgspec.msgpack.Decoder(Claims)


def body_digest(body: bytes) -> bytes:
    return blake2b(body, digest_size=DIGEST_BYTES).digest()


def write_hop(claims: Claims, key: str | None, method: bytes, target: bytes) -> bytes:
    """Return the value of the field."""
    octets = msgspec.msgpack.encode(claims)
    mac = _mac(octets, key, method, target)
    return b"%b;%b;%b" % (_VERSION, urlsafe_b64encode(octets), urlsafe_b64encode(mac))


def read_hop(value: bytes, key: str | None, method: bytes, target: bytes) -> Claims:
    """Return what is claimed, once it is known who claims it. Raises `HopError`.

    Without a key anybody may have written it: whoever calls has to know where it comes from.
    """
    version, _, rest = value.partition(b";")
    claimed, _, shown = rest.partition(b";")
    if len(value) > claim_limits.HOP_BYTES_MAX or version != _VERSION or not claimed:
        raise HopError("malformed", "it is not of a form that is known here")
    try:
        octets = b64decode(claimed, altchars=b"-_", validate=True)
        mac = b64decode(shown, altchars=b"-_", validate=True)
    except (NotBase64, ValueError):
        raise HopError("malformed", "it is not of a form that is known here") from None
    if not hmac.compare_digest(mac, _mac(octets, key, method, target)):
        raise HopError("forged", "it is not signed with this region's peer_key")
    try:
        return _decoder.decode(octets)
    except (msgspec.MsgspecError, ValueError):
        raise HopError("malformed", "its claims cannot be read") from None


def check_hop(
    claims: Claims, *, region: str, proxy_id: bytes, request_id: bytes | None, unix_s: float
) -> None:
    """Find out whether it is for this proxy, in this life, and for now. Raises `HopError`."""
    if claims.region != region:
        raise HopError("misdirected", "it is for another region")
    if not hmac.compare_digest(claims.proxy_id, proxy_id):
        raise HopError("moved", "it is for another proxy, or an earlier life of this one")
    if claims.origin == region:
        raise HopError("loop", "it comes from this very region")
    if claims.request_id.encode() != request_id:
        raise HopError("altered", "it is for a request of another id")
    if abs(unix_s - claims.unix_s) > claim_limits.HOP_SKEW_S:
        raise HopError(
            "expired",
            f"it was signed {unix_s - claims.unix_s:+.0f} s ago; keep the clocks of all regions "
            f"within {claim_limits.HOP_SKEW_S:.0f} s",
        )


def check_body(claims: Claims, body: bytes) -> None:
    """Raises `HopError` where the body is not the one that was signed."""
    if not hmac.compare_digest(claims.body_digest, body_digest(body)):
        raise HopError("altered", "its body is not the one that was signed")


def via_of(region: str) -> bytes:
    """Return our entry in `via`. What is no token there is written as a dash (RFC 9110 §5.6.2)."""
    shown = "".join([c if c.isascii() and (c.isalnum() or c in "-._") else "-" for c in region])
    return b"1.1 " + _PSEUDONYM + shown.encode()


def has_passed(via: bytes, region: str) -> bool:
    """Whether a request has been here before, by the field that all proxies leave their name in."""
    ours = via_of(region).partition(b" ")[2]
    for entry in via.split(b","):
        words = entry.split()
        if len(words) > 1 and words[1] == ours:
            return True
    return False


def _mac(octets: bytes, key: str | None, method: bytes, target: bytes) -> bytes:
    if key is None:
        return b""
    message = b"%b%d\0%b%b %b" % (_PURPOSE, len(octets), octets, method, target)
    return hmac.digest(key.encode(), message, "sha256")
