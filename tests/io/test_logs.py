"""The log is one line an event, whatever is in a name."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from proxy.logs import set_up_logging

EVIL = "a\n2026-01-01 00:00:00,000 INFO doherty.admin[1] all is well\x1b[2J\x9b\u202eé"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, given back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()  # else set-up would close pytest's own
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level = handlers, level


@pytest.mark.parametrize("as_json", [False, True])
def test_a_name_begins_no_line_and_moves_no_cursor(
    as_json: bool, root: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("info", as_json=as_json)
    logging.getLogger("doherty.scrape").warning("replica %s does not tell its load", EVIL)
    root.handlers[0].flush()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    if as_json:
        assert EVIL in json.loads(said)["event"]
    else:
        assert said[:-1].isprintable()
        assert "a\\n2026-01-01" in said
        assert said.endswith("\\x1b[2J\\x9b\\u202eé does not tell its load\n")
