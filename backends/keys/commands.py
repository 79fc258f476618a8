"""`doherty keys`: make, list, rotate and end API keys, and sum up what they were used for.

A key is printed once, when it is made: alone, on standard output, so that it can be piped into a
store of secrets; all words go to standard error. Nothing that is kept could be turned back into it.
A key that was made elsewhere is read from standard input, never from the command line, which
everybody on the machine can see.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import msgspec

from backends.arguments import names, seconds
from backends.failure import StartError
from backends.keys.changes import (
    IN_FORCE,
    REVOKED,
    NoSuchKeyError,
    added,
    expiring,
    find,
    pruned,
    revoked,
    state_of,
    successor,
)
from backends.keys.file import change, load
from backends.keys.making import (
    IMPORTED_CHARACTERS_MIN,
    PREFIX,
    RANDOM_BYTES,
    digest_of,
    miscopied,
    new_id,
    new_key,
)
from backends.keys.place import Place, check_rights, place_of, unknown_rights, usage_log_of
from backends.keys.showing import moment, page, record_shown, story, table
from backends.keys.usage import BY, COLUMNS, Usage
from proxy.config import ConfigError, WorkClass
from proxy.contract.key_file import KeyFileError
from proxy.contract.keys import KeyRecord, KeySet

GRACE_S = 86_400.0
PRUNE_S = 30 * 86_400.0
IMPORTED_BYTES_MAX = 4096


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the commands, each with its flags."""
    commands = parser.add_subparsers(metavar="ACTION", title="actions", required=True)
    create = _command(commands, "create", _create, "make a key; it is printed once")
    bring = _command(commands, "import", _import, "take in a key, read from standard input")
    for command in (create, bring):
        _add_rights(command)
    listing = _command(commands, "list", _list, "list the keys, by their ids")
    listing.add_argument("--tenant", metavar="TENANT", help="of this tenant only")
    listing.add_argument("--all", action="store_true", help="those that are over, too")
    show = _command(commands, "show", _show, "tell all of one key but the key itself")
    rotate = _command(commands, "rotate", _rotate, "make a key in place of another")
    rotate.add_argument("--grace", type=seconds, default=GRACE_S, metavar="TIME",
                        help="until the old one ends (default: 24h; 0s: now)")  # fmt: skip
    rotate.add_argument("--expires", type=seconds, metavar="TIME", help="until the new one ends")
    revoke = _command(commands, "revoke", _revoke, "end keys now")
    for command in (show, rotate):
        command.add_argument("key", metavar="KEY", help="its id, or its name")
    revoke.add_argument("keys", nargs="*", metavar="KEY", help="ids, or names")
    revoke.add_argument("--tenant", metavar="TENANT", help="all keys of this tenant")
    prune = _command(commands, "prune", _prune, "forget keys that are over")
    prune.add_argument("--over", type=seconds, default=PRUNE_S, metavar="TIME",
                       help="for so long (default: 30d)")  # fmt: skip

    usage = _command(commands, "usage", _usage, "sum up what was used, from usage records")
    usage.add_argument("records", nargs="*", metavar="FILE", help="'-': standard input "
                       "(default: proxy.usage_log of the configuration)")  # fmt: skip
    usage.add_argument("--by", type=names, default=BY, metavar="A,B",
                       help=f"columns: {', '.join(COLUMNS)} (default: {','.join(BY)})")  # fmt: skip
    usage.add_argument("--tenant", metavar="TENANT", help="of this tenant only")
    usage.add_argument("--since", type=seconds, metavar="TIME", help="of the last TIME, as 7d")
    usage.add_argument("--csv", action="store_true", help="print CSV")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], words: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=words)
    command.add_argument("--keys", dest="keys_path", metavar="FILE", help="file of keys")
    command.add_argument("--config", metavar="FILE", help="configuration that names it, or tenants")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=partial(_guarded, run))
    return command


def _add_rights(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tenant", required=True, metavar="TENANT", help="whose it is")
    command.add_argument("--name", default="", metavar="NAME", help="what it is for")
    command.add_argument("--expires", type=seconds, metavar="TIME", help="until it ends, as 90d")
    for what in ("models", "classes", "regions"):
        command.add_argument(
            f"--{what}", type=names, default=(), metavar="A,B", help=f"no other {what} than these"
        )


def _guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    try:
        return run(options)
    except (KeyFileError, NoSuchKeyError) as error:
        raise StartError(f"doherty keys: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"doherty keys: {error}") from error


def _place(options: argparse.Namespace) -> Place:
    return place_of(options.keys_path, options.config, os.environ)


# --- keys begin -------------------------------------------------------------------------------


def _create(options: argparse.Namespace) -> int:
    made = new_key(secrets.token_bytes(RANDOM_BYTES))
    record = _record(options, made.key_id, made.digest)
    place = _place(options)
    _take_in(place, options, record)
    _print_new(record, made.secret, place, as_json=options.json)
    return 0


def _import(options: argparse.Namespace) -> int:
    place = _place(options)
    secret = _read_secret()
    record = _record(options, new_id(secrets.token_bytes(RANDOM_BYTES)), digest_of(secret))
    _take_in(place, options, record)
    print(_json(record_shown(record, time.time())) if options.json else record.key_id)
    _say(f"taken in as {record.key_id}, of tenant {record.tenant}, in {place.path}")
    return 0


def _read_secret() -> str:
    """Return the key on standard input. Raises `ConfigError`."""
    if sys.stdin.isatty():
        _say("type or paste the key, then Enter:")
    line = sys.stdin.readline(IMPORTED_BYTES_MAX).strip()
    if len(line) < IMPORTED_CHARACTERS_MIN:
        raise ConfigError(
            f"a key of {len(line)} characters can be guessed; {IMPORTED_CHARACTERS_MIN} are the "
            "least, and `doherty keys create` makes one"
        )
    if not line.isascii() or not line.isprintable() or " " in line:
        raise ConfigError("a key is printable ASCII without spaces: nothing else passes in HTTP")
    if miscopied(line):
        raise ConfigError(f"it begins with {PREFIX} and is no key of that kind: part of it is lost")
    return line


def _record(options: argparse.Namespace, key_id: str, digest: str) -> KeyRecord:
    """Raises `ConfigError` for a class that there is not, or a text that is too long."""
    now_s = round(time.time(), 3)
    unknown = set(options.classes) - set(get_args(WorkClass))
    if unknown:
        classes = ", ".join(get_args(WorkClass))
        raise ConfigError(f"'{unknown.pop()}' is no class; there are {classes}")
    values = {
        "key_id": key_id,
        "tenant": options.tenant,
        "digest": digest,
        "name": options.name,
        "created_at": now_s,
        "expires_at": now_s + options.expires if options.expires is not None else 0.0,
        "models": options.models,
        "classes": options.classes,
        "regions": options.regions,
    }
    try:
        return msgspec.convert(values, KeyRecord)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error


def _take_in(place: Place, options: argparse.Namespace, record: KeyRecord) -> None:
    check_rights(
        place,
        record.tenant,
        models=record.models,
        classes=record.classes,
        regions=record.regions,
    )
    for unknown in unknown_rights(place, models=record.models, regions=record.regions):
        _say(f"warning: {unknown}")

    def make(keys: KeySet) -> KeySet:
        named = [k for k in keys.keys if k.name == record.name and k.tenant == record.tenant]
        if record.name and any(state_of(k, record.created_at) == IN_FORCE for k in named):
            _say(f"there is another key '{record.name}' of {record.tenant}: name them by their ids")
        return added(keys, record)

    change(place.path, make)


def _rotate(options: argparse.Namespace) -> int:
    place, now_s = _place(options), round(time.time(), 3)
    made = new_key(secrets.token_bytes(RANDOM_BYTES))
    pair: list[KeyRecord] = []

    def make(keys: KeySet) -> KeySet:
        old = find(keys, options.key, now_s)
        if state_of(old, now_s) == REVOKED:
            raise NoSuchKeyError(f"{old.key_id} was revoked; make another by `doherty keys create`")
        life_s = old.expires_at - old.created_at if old.expires_at else None
        life_s = life_s if options.expires is None else options.expires
        expires_s = now_s + life_s if life_s is not None else 0.0
        new = successor(old, made.key_id, made.digest, now_s=now_s, expires_s=expires_s)
        pair[:] = old, new
        return added(expiring(keys, old.key_id, now_s + options.grace), new)

    change(place.path, make)
    old, new = pair
    _print_new(new, made.secret, place, as_json=options.json)
    ends_s = min(now_s + options.grace, old.expires_at or now_s + options.grace)
    _say(f"the old one, {old.key_id}, ends {'now' if ends_s <= now_s else f'at {moment(ends_s)}'}")
    return 0


def _print_new(record: KeyRecord, secret: str, place: Place, *, as_json: bool) -> None:
    """Print a key: the only time that anybody sees it."""
    print(_json(record_shown(record, record.created_at) | {"key": secret}) if as_json else secret)
    _say(f"{story(record, record.created_at)}; kept in {place.path}. It is shown only this once")


# --- keys are looked at -----------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    now_s = time.time()
    shown = [
        key
        for key in load(_place(options).path).keys
        if options.tenant in (None, key.tenant)
        and (options.all or state_of(key, now_s) == IN_FORCE)
    ]
    if options.json:
        print(_json([record_shown(key, now_s) for key in shown]))
    else:
        print(table(shown, now_s))
    return 0


def _show(options: argparse.Namespace) -> int:
    now_s = time.time()
    key = record_shown(find(load(_place(options).path), options.key, now_s), now_s)
    if options.json:
        print(_json(key))
    else:
        print(page(key))
    return 0


# --- keys end ---------------------------------------------------------------------------------


def _revoke(options: argparse.Namespace) -> int:
    if not options.keys and options.tenant is None:
        raise ConfigError("which keys? name them by id or name, or all of a tenant by --tenant")
    now_s = round(time.time(), 3)
    ended: list[str] = []

    def make(keys: KeySet) -> KeySet:
        ids = [find(keys, name, now_s).key_id for name in options.keys]
        if options.tenant is not None:
            ids += _of_tenant(keys, options.tenant)
        ended[:] = dict.fromkeys(ids)
        return revoked(keys, ids, now_s)

    change(_place(options).path, make)
    if options.json:
        print(_json(ended))
    _say(f"revoked: {', '.join(ended)}")
    return 0


def _of_tenant(keys: KeySet, tenant: str) -> Sequence[str]:
    ids = [key.key_id for key in keys.keys if key.tenant == tenant]
    if not ids:
        raise NoSuchKeyError(f"tenant '{tenant}' has no keys; `doherty keys list` has all")
    return ids


def _prune(options: argparse.Namespace) -> int:
    place, gone = _place(options), 0

    def make(keys: KeySet) -> KeySet:
        nonlocal gone
        left = pruned(keys, time.time() - options.over)
        gone = len(keys.keys) - len(left.keys)
        return left

    change(place.path, make)
    _say(f"{gone} keys forgotten")
    if options.json:
        print(_json({"forgotten": gone}))
    return 0


# --- what they were used for ------------------------------------------------------------------


def _usage(options: argparse.Namespace) -> int:
    unknown = [column for column in options.by if column not in COLUMNS]
    if unknown or not options.by:
        raise ConfigError(f"--by: '{','.join(unknown)}' is none of {', '.join(COLUMNS)}")
    since_s = 0.0 if options.since is None else time.time() - options.since
    usage = Usage(options.by, since_s=since_s, tenant=options.tenant)
    for path in options.records or [usage_log_of(options.config, os.environ)]:
        try:
            with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as lines:
                usage.read(lines)
        except OSError as error:
            raise KeyFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if options.json:
        print(_json(usage.as_objects()))
    elif options.csv:
        print(usage.as_csv(), end="")
    else:
        print(usage.as_table())
    if usage.unreadable:
        _say(f"{usage.unreadable} lines were no usage records and are left out")
    return 0


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def _say(words: str) -> None:
    print(words, file=sys.stderr)
