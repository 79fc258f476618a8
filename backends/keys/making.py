"""What a key looks like, and how one is made.

    doh_XXXXXXXX_YYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYYCCCCCC
        id       256 random bits, base 62                   checksum

The prefix has scanners of repositories find it, and the checksum (CRC-32 of all before it, as in
the tokens of GitHub, whose form this follows) tells a key from what only looks like one, without
asking anybody. It also tells a person that one was copied badly. The id is public: it is what
lists, logs and usage records show. All characters are letters, digits and underscores, so that a
double click takes the whole.

Pure: randomness comes as octets.
"""

from __future__ import annotations

import hashlib
import re
import string
import zlib
from typing import NamedTuple

PREFIX = "doh_"
ID_CHARACTERS, SECRET_CHARACTERS, CHECK_CHARACTERS = 8, 43, 6
RANDOM_BYTES = 8 + 32  # of the id and of the secret
IMPORTED_CHARACTERS_MIN = 20
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{ID_CHARACTERS}}}_[0-9A-Za-z]{{49}}")


class NewKey(NamedTuple):
    """One that was just made. `secret` is the whole key: shown once, kept nowhere."""

    key_id: str
    secret: str

    @property
    def digest(self) -> str:
        return digest_of(self.secret)


def new_key(random: bytes) -> NewKey:
    """Return a key made of `RANDOM_BYTES` random octets."""
    assert len(random) == RANDOM_BYTES
    key_id = _base62(int.from_bytes(random[:8]) % 62**ID_CHARACTERS, ID_CHARACTERS)
    secret = _base62(int.from_bytes(random[8:]), SECRET_CHARACTERS)
    text = f"{PREFIX}{key_id}_{secret}"
    return NewKey(key_id, text + _checksum(text))


def new_id(random: bytes) -> str:
    """Return an id for a key that was made elsewhere."""
    return new_key(random).key_id


def digest_of(secret: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def miscopied(secret: str) -> bool:
    """Say whether this begins as our keys do and is none: some of it was lost or changed."""
    if not secret.startswith(PREFIX):
        return False
    return (
        not _FORM.fullmatch(secret)
        or _checksum(secret[:-CHECK_CHARACTERS]) != (secret[-CHECK_CHARACTERS:])
    )


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), CHECK_CHARACTERS)


def _base62(number: int, characters: int) -> str:
    digits = []
    for _ in range(characters):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    assert not number
    return "".join(reversed(digits))
