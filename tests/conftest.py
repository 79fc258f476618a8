"""Settings of the property tests: the same cases on every run, and a longer profile by name.

`HYPOTHESIS_PROFILE=thorough` draws many more cases, and other ones each time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# No deadline: the machine's load is no property of the code.
settings.register_profile(
    "default",
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    derandomize=False,
    max_examples=3000,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Let a sweep run uncounted: counting branches trebles its price, and others count them all."""
    tracer = sys.gettrace()  # a debugger's is left alone
    counting = type(tracer).__module__.partition(".")[0] == "coverage"
    if not counting or item.get_closest_marker("sweep") is None:
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)
