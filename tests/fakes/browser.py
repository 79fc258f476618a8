"""A real browser without a window: Debian's Chromium, driven over its own protocol.

It keeps what a page writes to its console and whom it asks, so that a test can say: nothing, and
nobody but the server under test.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any, Self

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *(
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--disable-component-update",
        "--no-first-run",
    ),
    *("--disable-extensions", "--disable-sync", "--force-color-profile=srgb"),
)
PATIENCE_S = 30.0


def missing() -> str:
    """Return what of a browser is not there, in words; nothing: it is all there."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(absent)} (Debian: chromium chromium-driver)" if absent else ""


class Browser:
    """Use as `with Browser() as browser`."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def command(self, name: str, **values: object) -> Any:
        return self.driver.execute_cdp_cmd(name, values)

    def open(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Open a page as if for the first time, in a window of this size."""
        self.driver.get("about:blank")
        self.console()
        self.resize(width, height, dark=dark)
        self.driver.get(url)

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Change the window and the system's theme under a page that stays."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def js(self, script: str, *values: object) -> Any:
        return self.driver.execute_script(script, *values)

    def run(self, script: str, *values: object) -> Any:
        """Run the body of an async function; return what it returns."""
        wrapped = (
            "const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);"
            f"(async (...given) => {{ {script} }})(...given).then((value) => done([value]),"
            "(error) => done(String(error)));"
        )
        answer = self.driver.execute_async_script(wrapped, *values)
        assert isinstance(answer, list), answer
        return answer[0]

    def until(self, script: str, *values: object) -> Any:
        """Return what an expression is when it is first true of the page."""
        return wait(lambda: self.js(f"return {script}", *values), script)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector))

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def console(self) -> list[str]:
        """Return what has been written to the console, and forget it."""
        return [
            f"{entry['level']}: {entry['message']}"
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("WARNING", "SEVERE")
        ]

    def asked(self) -> list[str]:
        """Return the addresses that the page has asked; what was forbidden, the console has."""
        script = "return performance.getEntriesByType('resource').map(({ name }) => name)"
        found: list[str] = self.js(script)
        return found


def wait(seen: Callable[[], Any], what: str) -> Any:
    """Return the first true value; fail when none comes for very long."""
    end_s = time.monotonic() + PATIENCE_S
    while not (value := seen()):
        assert time.monotonic() < end_s, f"it never came: {what}"
        time.sleep(0.05)
    return value
