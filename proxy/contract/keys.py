"""API keys as they are kept and told: digests, whose they are, and what they may do less than all.

A key is 256 random bits behind a prefix, so one round of SHA-256 keeps it: there is nothing to
guess, and a slow hash would only be a way to make a proxy work (NIST SP 800-63B-4 §3.1.1.2 asks for
slow ones where people choose the secret). A set is told as a whole, as fleets are.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated

import msgspec
from msgspec import Meta

KEYS_PATH = "/v1/keys"
KEYS_WATCH_PATH = "/v1/keys/watch"
KEYS_BYTES_MAX = 16 * 1024 * 1024
KEYS_MAX = 65_536
SALT_CHARACTERS_MIN = 16

_Text = Annotated[str, Meta(max_length=128)]
_Seconds = Annotated[float, Meta(ge=0, le=1e11)]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One key. Times are Unix seconds; 0: never. Empty tuples allow what the tenant may."""

    key_id: _Text  # public; it is what logs and metrics may show
    tenant: _Text
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 of the key
    name: _Text = ""
    created_at: _Seconds = 0.0
    expires_at: _Seconds = 0.0
    revoked_at: _Seconds = 0.0
    models: tuple[_Text, ...] = ()
    classes: tuple[_Text, ...] = ()
    regions: tuple[_Text, ...] = ()


class KeySet(msgspec.Struct, frozen=True, kw_only=True):
    """All keys. `salt` is drawn once: what must stay the same for a tenant is derived with it."""

    version: Annotated[int, Meta(ge=0)] = 0
    salt: _Text = ""
    keys: tuple[KeyRecord, ...] = ()


def follow_token(peer_key: str) -> str:
    """Return what shows whoever tells keys that somebody has the secret of all proxies."""
    return hmac.new(peer_key.encode(), b"doherty follow keys", hashlib.sha256).hexdigest()


def encode_keys(keys: KeySet) -> bytes:
    """Return one JSON line without its newline."""
    return msgspec.json.encode(keys)


def decode_keys(line: bytes) -> KeySet:
    """Return the set in one line; raises `msgspec.MsgspecError` when it is none."""
    if len(line) > KEYS_BYTES_MAX:
        raise msgspec.ValidationError(f"a set of keys over {KEYS_BYTES_MAX} bytes")
    keys = _DECODER.decode(line)
    if len(keys.salt) < SALT_CHARACTERS_MIN:
        # What is derived with it could be guessed; and other things have a version, too.
        raise msgspec.ValidationError(f"salt needs {SALT_CHARACTERS_MIN} characters or more")
    return keys


_DECODER = msgspec.json.Decoder(KeySet)
