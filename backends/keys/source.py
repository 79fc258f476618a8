"""All that a manager does with keys: where they come from, and who is told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Iterator

from backends.failure import StartError
from backends.keys.door import Door
from backends.keys.feed import KeyFeed, KeySource
from backends.log import Log
from proxy.config import Config, ConfigError


class Keys:
    """The source, and the door for other regions where there is one."""

    def __init__(self, source: KeySource, door: Door | None, peer_key: str | None) -> None:
        self._source, self._door = source, door
        self.peer_key = peer_key  # by which those are known who are told

    @property
    def feed(self) -> KeyFeed | None:
        return self._source.feed

    def chores(self) -> list[Coroutine[None, None, None]]:
        """Return what has to run as long as the manager does."""
        return [self._source.run(), *([self._door.serve()] if self._door is not None else [])]


@contextlib.contextmanager
def told_keys(config: Config, log: Log) -> Iterator[Keys]:
    """Read the keys and take the port, before anything is started. Raises `StartError`."""
    try:
        source = KeySource(config, log)
        door = _door(config, source.feed, log)
    except ConfigError as error:
        raise StartError(str(error)) from error
    try:
        yield Keys(source, door, config.proxy.peer_key)
    finally:
        if door is not None:
            door.close()


def _door(config: Config, feed: KeyFeed | None, log: Log) -> Door | None:
    address = config.manager.keys_listen
    if address is None:
        return None
    if feed is None:
        raise StartError("manager.keys_listen: there are no keys to tell; set keys_path")
    return Door(config, feed, address, log)
