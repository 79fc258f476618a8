"""Who cannot see, cannot point or has a small screen: names, roles, contrast, keys, widths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.fakes.browser import Browser
from tests.fakes.dashboard_server import DashboardServer
from tests.fakes.views import a_view

COMPLAINTS = Path(__file__).with_name("accessibility.js").read_text(encoding="utf-8")
# What has to have a name, by its role in the accessibility tree.
NAMED = frozenset(
    (
        *(
            "button",
            "link",
            "textbox",
            "searchbox",
            "combobox",
            "radio",
            "checkbox",
            "table",
            "dialog",
        ),
        *(
            "region",
            "navigation",
            "columnheader",
            "rowheader",
            "image",
            "heading",
            "log",
            "alertdialog",
        ),
    )
)


@pytest.fixture
def server(browser: Browser) -> Iterator[DashboardServer]:
    with DashboardServer(a_view(30)) as started:
        yield started
        browser.driver.get("about:blank")


def opened(browser: Browser, server: DashboardServer, **window: Any) -> Browser:
    browser.open(server.url, **window)
    browser.until("document.body.dataset.drawn")
    return browser


def opened_wide(browser: Browser, server: DashboardServer, **window: Any) -> Browser:
    """Open it with everything unfolded and an explanation shown."""
    terms = {"price_s": 0.5, "wait_s": 0.2, "cached_tokens": 4, "uncached_tokens": 2, "inflight": 3}
    candidates = [
        {"replica": "r1", "may_take": True, **terms},
        {"replica": "r2", "may_take": False, "reason": "it is asleep"},
    ]
    decision = {"replica": "r1", "reason": "prefix", **terms}
    points = [{"octets": 256, "hash": "aa"}]
    said = {"decision": decision, "candidates": candidates, "chain": {"points": points}}
    server.explained = (200, said)
    opened(browser, server, **window)
    browser.js("for (const each of document.querySelectorAll('details')) each.open = true")
    browser.click("#explain [data-part=submit]")
    browser.until("!document.querySelector('#explain [data-part=result]').hidden")
    browser.until("document.querySelector('#ring [data-part=share-rows]').childElementCount")
    return browser


def test_the_page_gives_no_cause_for_complaint(browser: Browser, server: DashboardServer) -> None:
    opened_wide(browser, server)
    for width in (1440, 400):
        for dark in (False, True):
            browser.resize(width, dark=dark)
            assert browser.js(COMPLAINTS) == [], (width, dark)


def test_a_dialog_gives_no_cause_for_complaint(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    buttons = {"key": "#key", "drain": "#replicas .drain", "replica": "#replicas .v-name"}
    for dialog, button in buttons.items():
        browser.click(button)
        for dark in (False, True):
            browser.resize(1440, dark=dark)
            assert browser.js(COMPLAINTS) == [], (dialog, dark)
        inside = f"document.querySelector('#{dialog}-dialog').contains(document.activeElement)"
        assert browser.js(f"return {inside}")
        ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
        browser.until(f"!document.querySelector('#{dialog}-dialog').open")
        assert browser.js("return document.activeElement.tagName") == "BUTTON"  # back where it was


def test_everything_has_a_name_and_a_role(browser: Browser, server: DashboardServer) -> None:
    opened_wide(browser, server)
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    seen: dict[str, int] = {}
    nameless = []
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        if node["ignored"] or role not in NAMED:
            continue
        seen[role] = seen.get(role, 0) + 1
        if not node.get("name", {}).get("value", "").strip():
            nameless.append((role, node["nodeId"]))
    assert nameless == []
    assert seen["button"] > 60
    assert {
        "link",
        "searchbox",
        "combobox",
        "radio",
        "table",
        "columnheader",
        "image",
    } <= seen.keys()


def test_cards_are_still_a_table(browser: Browser, server: DashboardServer) -> None:
    """Elements that are no longer laid out as a table lose its roles, unless they are said."""
    opened(browser, server, width=400)
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    roles = [node.get("role", {}).get("value") for node in nodes if not node["ignored"]]
    assert roles.count("rowheader") >= 10
    assert roles.count("cell") + roles.count("gridcell") >= 100


def test_the_page_never_scrolls_sideways(browser: Browser, server: DashboardServer) -> None:
    opened_wide(browser, server)
    outside = """return [...document.querySelectorAll("#replicas .drain")]
      .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth).length"""
    inside = """return [...document.querySelectorAll(".scroll:has(.cards)")]
      .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth)
      .map((e) => e.innerText)"""
    for width in (320, 400, 600, 759, 760, 980, 1240, 1920):
        browser.resize(width)
        assert browser.js("return document.documentElement.scrollWidth") <= width
        assert browser.js(outside) == 0, width
        if width < 760:  # cards scroll nowhere, not even inside
            assert browser.js(inside) == []


def test_every_control_is_reached_by_the_keyboard_and_seen_there(
    browser: Browser, server: DashboardServer
) -> None:
    opened(browser, server, width=1000)
    reachable = browser.js(
        """const stops = "a, button, input, select, textarea, summary, [tabindex='0']";
        return [...document.querySelectorAll(stops)].filter((e) => !e.closest("dialog")
          && e.checkVisibility({ visibilityProperty: true }) && !e.disabled).length"""
    )
    browser.js(
        """window.met = new Set(); window.hidden = [];
        document.addEventListener("focusin", ({ target }) => {
          window.met.add(target);
          const { outlineStyle, outlineWidth } = getComputedStyle(target);
          const seen = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
          if (!seen) window.hidden.push(target.outerHTML.slice(0, 80));
        });"""
    )
    ActionChains(browser.driver).send_keys(*[Keys.TAB] * (reachable + 2)).perform()
    # Of two radio buttons the keyboard stops at one; arrows lead to the other.
    assert browser.js("return window.met.size") >= reachable - 1
    assert browser.js("return window.hidden") == []


def test_the_first_stop_leads_past_the_head(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    ActionChains(browser.driver).send_keys(Keys.TAB).perform()
    assert browser.js("return document.activeElement.className") == "skip"
    browser.until("document.activeElement.getBoundingClientRect().top >= 0")
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    browser.until("document.activeElement.id === 'main'")


def test_who_wants_no_motion_gets_none(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    still = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.command("Emulation.setEmulatedMedia", features=still)
    moving = """return [...document.querySelectorAll("*")].filter((e) => {
      const { transitionDuration, animationName } = getComputedStyle(e);
      return transitionDuration !== "0s" || animationName !== "none";
    }).length"""
    assert browser.js(moving) == 0
