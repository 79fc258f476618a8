"""The page over views that few fleets have: 500 replicas, failures, names made to hurt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from proxy.contract.view import Percentiles, View
from tests.fakes.browser import Browser, wait
from tests.fakes.dashboard_server import DashboardServer
from tests.fakes.views import a_view

UNKNOWN = "\N{EN DASH}"
COUNT_DRAWN = """window.drawn = 0;
new MutationObserver(() => { window.drawn += 1; })
  .observe(document.body, { attributeFilter: ["data-drawn"] });"""
HOSTILE = '<img src=x onerror="window.hurt = 1">'


def changed(view: View, **fields: Any) -> View:
    return msgspec.structs.replace(view, **fields)


def with_replica(view: View, place: int, **fields: Any) -> View:
    replicas = list(view.replicas)
    replicas[place] = msgspec.structs.replace(replicas[place], **fields)
    return changed(view, replicas=tuple(replicas))


def all_ready(replicas: int) -> View:
    """Return a view in which nothing needs a look."""
    view = a_view(replicas)
    ready = [
        msgspec.structs.replace(one, state="ready", reason="", suspect=False, held=False)
        for one in view.replicas
    ]
    calm = [msgspec.structs.replace(one, refused_per_s=0.0, oldest_s=None) for one in view.classes]
    proxy = msgspec.structs.replace(view.proxy, errors_per_s=0.0)
    pools = [msgspec.structs.replace(one, waiting="") for one in view.pools]
    regions = [msgspec.structs.replace(one, linked=True) for one in view.regions]
    return changed(
        view,
        replicas=tuple(ready),
        classes=tuple(calm),
        proxy=proxy,
        pools=tuple(pools),
        regions=tuple(regions),
    )


@pytest.fixture
def server(browser: Browser) -> Iterator[DashboardServer]:
    """A server; the page must not have complained when the test is over."""
    with DashboardServer(all_ready(8)) as started:
        yield started
        browser.driver.get("about:blank")


def opened(browser: Browser, server: DashboardServer, **window: Any) -> Browser:
    browser.open(server.url, **window)
    browser.until("document.body.dataset.drawn")
    return browser


def row(name: str) -> str:
    """Return the script that finds the row of a replica."""
    is_it = f"(row) => row.querySelector('.v-name').textContent === {json.dumps(name)}"
    return f"[...document.querySelectorAll('#replicas tbody tr')].find({is_it})"


def names(browser: Browser) -> list[str]:
    script = (
        'return [...document.querySelectorAll("#replicas tbody .v-name")].map((e) => e.textContent)'
    )
    found: list[str] = browser.js(script)
    return found


def test_a_view_is_shown_in_every_panel(browser: Browser, server: DashboardServer) -> None:
    view = server.view = with_replica(all_ready(8), 0, inflight=7, inflight_max=64, restarts=3)
    opened(browser, server)
    assert browser.text("#proxy-state .word") == "ready"
    assert browser.text("#link-state .word") == "live"
    assert browser.text("#concern .word") == "Nothing needs a look."
    assert "region eu-west" in browser.text("#about")
    assert names(browser) == [one.replica_id for one in view.replicas]
    first = browser.js(f"return {row(view.replicas[0].replica_id)}.textContent")
    assert "7 / 64" in first
    assert first.count("Drain") == 1
    texts = {
        "#classes": [one.work_class for one in view.classes],
        "#models": [one.model for one in view.models],
        "#ring": [one.name[:8] for one in view.rings[0].prefixes],
        "#reasons": list(view.decisions),
        "#codes": list(view.codes),
        "#scaling": [view.pools[0].pool, view.scaling[0].reason],
        "#regions": [one.region for one in view.regions],
    }
    for panel, words in texts.items():
        shown = browser.text(panel)
        assert [word for word in words if word not in shown] == [], panel
    arcs = "document.querySelectorAll('#ring .arc').length"
    assert browser.js(f"return {arcs}") == len({arc.replica_id for arc in view.rings[0].arcs})
    assert browser.js("return document.title") == "Doherty eu-west"
    assert browser.console() == []
    outside = [url for url in browser.asked() if not url.startswith(server.url)]
    assert outside == []


def test_what_changes_is_shown_and_what_does_not_is_left_alone(
    browser: Browser, server: DashboardServer
) -> None:
    view = server.view = all_ready(8)
    name = view.replicas[2].replica_id
    opened(browser, server)
    browser.js(
        """window.touched = [];
        const all = { subtree: true, childList: true, characterData: true, attributes: true };
        new MutationObserver((found) => {
          window.touched.push(...found.map(({ target }) => target.textContent));
        }).observe(document.querySelector("#replicas"), all);"""
        + COUNT_DRAWN
    )
    browser.until("window.drawn >= 3")
    assert browser.js("return window.touched") == []
    server.view = with_replica(view, 2, requests_per_s=417.0)
    browser.until(f'{row(name)}.textContent.includes("417/s")')
    assert set(browser.js("return window.touched")) == {"417/s"}


def test_nothing_moves_while_numbers_change(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    browser.js(
        """window.shift = 0;
        new PerformanceObserver((list) => {
          for (const { value } of list.getEntries()) window.shift += value;
        }).observe({ type: "layout-shift" });"""
        + COUNT_DRAWN
    )
    for seed in range(4):
        told = a_view(8, seed)
        server.view = changed(
            server.view, proxy=told.proxy, classes=told.classes, models=told.models
        )
        before = browser.js("return window.drawn")
        browser.until("window.drawn > arguments[0] + 1", before)
    assert browser.js("return window.shift") == 0


def test_500_replicas_come_in_pages(browser: Browser, server: DashboardServer) -> None:
    view = server.view = a_view(500)
    opened(browser, server)
    assert len(names(browser)) == 25
    assert browser.text('#replicas [data-part="range"]') == "1 to 25 of 500"
    browser.click('#replicas [data-part="next"]')
    assert names(browser) == [one.replica_id for one in view.replicas[25:50]]
    browser.find('#replicas [data-part="filter"]').send_keys("backoff")
    ill = [one.replica_id for one in view.replicas if one.state == "backoff"]
    assert names(browser) == ill[:25]
    browser.find('#replicas [data-part="filter"]').clear()
    browser.js(
        "document.querySelector('#replicas [data-part=filter]').dispatchEvent(new Event('input'))"
    )
    head = ".col-inflight"
    browser.click(f"{head} button")
    assert browser.find(head).get_attribute("aria-sort") == "descending"
    busiest = sorted((one.inflight for one in view.replicas), reverse=True)[:25]
    by_name = {one.replica_id: one.inflight for one in view.replicas}
    assert [by_name[name] for name in names(browser)] == busiest
    browser.click(f"{head} button")
    assert browser.find(head).get_attribute("aria-sort") == "ascending"
    assert [by_name[name] for name in names(browser)] == sorted(by_name.values())[:25]
    assert len(browser.js("return [...document.querySelectorAll('#ring .arc')]")) > 100
    assert browser.console() == []


def test_the_order_stands_still_under_a_pointer(browser: Browser, server: DashboardServer) -> None:
    view = server.view = all_ready(8)
    opened(browser, server)
    browser.click(".col-inflight button")
    busiest = names(browser)
    button = browser.js(f"return {row(busiest[0])}.querySelector('.drain')")
    browser.js("arguments[0].focus()", button)
    place = [one.replica_id for one in view.replicas].index(busiest[-1])
    server.view = with_replica(view, place, inflight=63_000)
    browser.until(f"{row(busiest[-1])}.textContent.includes('63.0k')")
    assert names(browser) == busiest
    assert browser.js("return document.activeElement === arguments[0]", button)
    browser.js("document.activeElement.blur()")
    first = "document.querySelector('#replicas tbody .v-name').textContent"
    browser.until(f"{first} === arguments[0]", busiest[-1])


def test_a_failed_replica_is_told_of_first(browser: Browser, server: DashboardServer) -> None:
    view = server.view = all_ready(8)
    opened(browser, server)
    name, reason = (
        view.replicas[5].replica_id,
        "it died with exit status 137; the next start is in 8 s",
    )
    server.view = with_replica(view, 5, state="backoff", reason=reason, restarts=4)
    browser.until("document.querySelector('#concern').dataset.tone === 'bad'")
    assert browser.text("#concern .word") == f"{name} is in backoff: {reason}"
    assert browser.js("return document.title") == "1 in trouble · Doherty eu-west"
    spoken = browser.until("document.querySelector('#spoken').textContent")
    assert spoken == f"{name} is in backoff"  # no number is ever spoken
    browser.click("#concerns summary")
    browser.click("#look")
    assert names(browser) == [name]
    server.view = view
    browser.until("document.querySelector('#concern').dataset.tone === 'good'")
    assert browser.text("#spoken") == f"{name} is in backoff{name} is ready"
    assert browser.text('#replicas [data-part="empty"]') == "No replica is like that."


def test_a_drain_is_confirmed_sent_and_told(browser: Browser, server: DashboardServer) -> None:
    view = server.view = with_replica(all_ready(8), 0, replica_id="a/b c", inflight=3)
    opened(browser, server)
    press = f"{row('a/b c')}.querySelector('.drain').click()"
    browser.js(press)
    assert browser.text("#drain-title") == "Drain a/b c?"
    assert "Those that it has, 3, run to their end" in browser.text("#drain-words")
    assert "other replicas are ready" in browser.text("#drain-others")
    browser.click("#drain-dialog [data-close]")
    assert [path for method, path in server.asked if method == "POST"] == []
    browser.js(press)
    browser.click("#drain-go")
    browser.until("!document.querySelector('#drain-dialog').open")
    assert ("POST", "/replicas/a/b c/drain") in server.asked
    server.view = with_replica(view, 0, state="draining", held=True)
    browser.until(f"{row('a/b c')}.querySelector('.drain').textContent === 'Undrain'")
    server.wish_status = 503
    browser.js(press)
    browser.click("#drain-go")
    browser.until("!document.querySelector('#drain-failed').hidden")
    assert browser.text("#drain-failed") == "It was not done: the manager cannot be reached"
    assert ("POST", "/replicas/a/b c/undrain") in server.asked


def test_a_replicas_name_opens_all_that_is_told_of_it(
    browser: Browser, server: DashboardServer
) -> None:
    told = {"models": ("one", "two"), "cache_source": "events", "cache_source_age_s": 0.2}
    view = server.view = with_replica(all_ready(8), 1, inflight=5, inflight_max=0, **told)
    opened(browser, server)
    browser.js(f"{row(view.replicas[1].replica_id)}.querySelector('.v-name').click()")
    assert browser.text("#replica-title") == view.replicas[1].replica_id
    said = browser.text("#replica-dialog dl")
    assert "Modelsone, two" in said
    assert "Requests there5, without a limit" in said
    assert "the engine's events, 200 ms ago" in said
    server.view = with_replica(view, 1, inflight=6, inflight_max=64)
    browser.until("document.querySelector('.details').textContent.includes('6 of at most 64')")
    server.view = changed(view, replicas=view.replicas[2:])
    browser.until("document.querySelector('.details').textContent === 'Stateit is gone'")


def test_the_last_ready_one_is_warned_of(browser: Browser, server: DashboardServer) -> None:
    view = server.view = all_ready(1)
    opened(browser, server)
    browser.js(f"{row(view.replicas[0].replica_id)}.querySelector('.drain').click()")
    assert browser.text("#drain-others").startswith("No other replica is ready for qwen3-32b")
    assert browser.find("#drain-others").get_attribute("data-tone") == "bad"


def test_where_no_drain_is_taken_the_page_says_why(
    browser: Browser, server: DashboardServer
) -> None:
    view = all_ready(8)
    proxy = msgspec.structs.replace(view.proxy, can_drain="set admin_api_key")
    server.view = changed(view, proxy=proxy)
    opened(browser, server)
    assert browser.text("#drain-refusal") == "Drain and undrain are off: set admin_api_key"
    button = browser.find("#replicas .drain")
    assert button.get_attribute("aria-disabled") == "true"
    button.click()
    assert not browser.js("return document.querySelector('#drain-dialog').open")


def test_the_key_is_asked_for_and_kept_in_this_tab_alone(
    browser: Browser, server: DashboardServer
) -> None:
    server.key = "open ünd shut"
    browser.open(server.url)
    browser.until("document.querySelector('#key-dialog').open")
    assert browser.text("#link-state .word") == "admin key wanted"
    browser.find("#key-value").send_keys("wrong")
    browser.click("#key-form [type=submit]")
    browser.until("document.querySelector('#key-why').textContent.startsWith('That key is not')")
    browser.find("#key-value").send_keys(server.key)
    browser.click("#key-form [type=submit]")
    browser.until("document.body.dataset.drawn")
    kept = "[localStorage.length, sessionStorage.length, location.href, document.cookie]"
    assert browser.js(f"return {kept}") == [0, 1, server.url, ""]
    browser.driver.refresh()
    browser.until("document.body.dataset.drawn")
    browser.click("#key")
    browser.click("#key-forget")
    browser.until("document.querySelector('#link-state .word').textContent === 'admin key wanted'")
    assert browser.js("return sessionStorage.length") == 0
    allowed = [line for line in browser.console() if "401" not in line]
    assert allowed == []


def test_a_stream_that_ends_is_begun_again(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    server.refusing = "as many watch as may, 32: close a page"
    server.cut()
    notice = browser.until(
        "document.querySelector('#stale:not([hidden])')?.textContent.match(/.*as many.*/)?.[0]"
    )
    assert notice.startswith(f"No view comes: {server.refusing}. What you see is")
    assert browser.text("#link-state .word").startswith("reconnecting")
    server.refusing = ""
    browser.click("#retry")
    browser.until("document.querySelector('#link-state .word').textContent === 'live'")
    assert "The connection is lostThe connection is back" in browser.text("#spoken")
    server.silent = True
    browser.until("document.querySelector('#link-state .word').textContent.startsWith('stale')")
    assert browser.find("body").get_attribute("data-stale") == "yes"


def test_names_that_were_made_to_hurt_are_names(browser: Browser, server: DashboardServer) -> None:
    view = all_ready(8)
    fields = ("replica_id", "pool", "region", "engine", "engine_version", "reason")
    view = with_replica(view, 0, state="backoff", **dict.fromkeys(fields, HOSTILE))
    view = with_replica(view, 0, models=(HOSTILE,), gpus=(HOSTILE,))
    ring = view.rings[0]
    prefix = msgspec.structs.replace(
        ring.prefixes[0], name=HOSTILE, home=HOSTILE, holders=(HOSTILE,)
    )
    arcs = tuple(msgspec.structs.replace(arc, replica_id=HOSTILE) for arc in ring.arcs)
    server.view = changed(
        view,
        proxy=msgspec.structs.replace(
            view.proxy, not_ready=HOSTILE, region=HOSTILE, policy=HOSTILE, can_drain=HOSTILE
        ),
        rings=(msgspec.structs.replace(ring, model=HOSTILE, arcs=arcs, prefixes=(prefix,)),),
        models=(msgspec.structs.replace(view.models[0], model=HOSTILE),),
        classes=(msgspec.structs.replace(view.classes[0], work_class=HOSTILE),),
        pools=(
            msgspec.structs.replace(view.pools[0], pool=HOSTILE, waiting=HOSTILE, model=HOSTILE),
        ),
        scaling=(
            msgspec.structs.replace(
                view.scaling[0], pool=HOSTILE, reason=HOSTILE, moves=(HOSTILE,)
            ),
        ),
        regions=(msgspec.structs.replace(view.regions[0], region=HOSTILE, peer=HOSTILE),),
        decisions={HOSTILE: 1.0, "__proto__": 1.0, "constructor": 2.0},
        codes={HOSTILE: 1.0},
    )
    opened(browser, server)
    server.explained = (
        200,
        {
            "decision": {"replica": HOSTILE, "reason": HOSTILE, "price_s": 1.0},
            "candidates": [{"replica": HOSTILE, "may_take": False, "reason": HOSTILE}],
            "chain": {"points": [{"octets": 1, "hash": HOSTILE}]},
        },
    )
    browser.click("#explain [data-part=submit]")
    browser.until("!document.querySelector('#explain [data-part=result]').hidden")
    images = (
        "return [...document.querySelectorAll('img')].map((image) => image.getAttribute('src'))"
    )
    assert browser.js(images) == ["icon.svg"]
    assert browser.js("return window.hurt ?? null") is None
    assert HOSTILE in browser.text("#replicas")
    assert browser.console() == []


def test_without_anything_it_says_so_in_words(browser: Browser, server: DashboardServer) -> None:
    view = server.view = all_ready(1)
    proxy = msgspec.structs.replace(
        view.proxy, manager_url=None, not_ready="no replica can take a request", cached_ratio=None
    )
    server.view = View(at_s=view.at_s, window_s=0.0, proxy=proxy)
    opened(browser, server)
    assert browser.text("#concern .word") == "The proxy is not ready: no replica can take a request"
    assert browser.text('#replicas [data-part="empty"]').startswith("There is no replica.")
    assert "There is no manager" in browser.text("#scaling")
    assert "No ring is told of" in browser.text("#ring")
    assert not browser.find("#regions").is_displayed()
    assert UNKNOWN in browser.text("#figures")
    assert browser.console() == []


def test_an_unknown_version_is_not_guessed_at(browser: Browser, server: DashboardServer) -> None:
    server.view = b'{"view_version": 2}'
    browser.open(server.url)
    notice = "document.querySelector('#stale:not([hidden])')?.textContent"
    said = browser.until(notice)
    assert "it reads views of version 1, these are of version 2. Load it again." in said
    good = server.view = all_ready(8)
    browser.until("document.body.dataset.drawn && document.querySelector('#stale').hidden")
    assert browser.console() == []
    broken = {**msgspec.to_builtins(good), "replicas": 3}
    server.view = msgspec.json.encode(broken)
    said = browser.until(notice)
    assert said.startswith("This page stands still: what came cannot be shown")
    assert browser.find("body").get_attribute("data-stale") == "yes"
    assert len(names(browser)) == 8  # what was right before is still there


def test_a_request_is_explained(browser: Browser, server: DashboardServer) -> None:
    terms = {"price_s": 0.5, "wait_s": 0.2, "prefill_s": 0.3, "recompute_s": 0.0}
    rest = {"cached_tokens": 10, "uncached_tokens": 90, "inflight": 4, "cache_source": "events"}
    server.explained = (
        200,
        {
            "route": "chat",
            "model": "m",
            "class": "online",
            "policy": "prefix",
            "stream": False,
            "held": False,
            "waiting": 0,
            "session": {"given_by": "header", "pinned": False},
            "tenant": "",
            "key_id": "",
            "chain": {
                "home_key": "00ff",
                "prompt_octets": 400,
                "points": [{"octets": 256, "hash": "aa"}, {"octets": 400, "hash": "bb"}],
            },
            "decision": {
                "replica": "r1",
                "reason": "prefix",
                "prompt_tokens": 100,
                "cached_octets": 40,
                **terms,
            },
            "candidates": [
                {"replica": "r1", "may_take": True, **terms, **rest},
                {"replica": "r2", "may_take": False, "reason": "it is asleep"},
            ],
        },
    )
    opened(browser, server)
    form = "#explain [name={}]"
    browser.js("document.querySelector(arguments[0]).value = 'm'", form.format("model"))
    browser.find(form.format("prompt")).send_keys("Why is the sky blue?")
    browser.js("document.querySelector('#explain details').open = true")
    browser.find(form.format("fields")).send_keys("x-session-id: s1")
    browser.click("#explain [data-part=submit]")
    browser.until("!document.querySelector('#explain [data-part=result]').hidden")
    fields, body = server.bodies[0]
    assert json.loads(body) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    }
    assert fields["x-session-id"] == "s1"
    assert browser.text("#explain [data-part=answer]") == (
        "Goes to r1: prefix, it has the most of the prompt cached. Price 500 ms."
    )
    heads = browser.js(
        "return [...document.querySelectorAll('.candidates thead th')].map((e) => e.textContent)"
    )
    assert heads[:4] == ["Candidate", "Price", "Wait", "Prefill"]
    assert "Recompute" not in heads  # nothing for anybody
    rows = browser.js(
        "return [...document.querySelectorAll('.candidates tbody tr')].map((e) => e.innerText)"
    )
    assert "chosen" in rows[0]
    assert "cannot: it is asleep" in rows[1]
    browser.js('document.querySelector("#explain [value=body]").click()')
    browser.find(form.format("body")).send_keys("not json")
    server.explained = (400, {"error": {"message": "the body is not valid JSON"}})
    browser.click("#explain [data-part=submit]")
    browser.until("document.querySelector('#explain [data-part=answer]').dataset.tone === 'bad'")
    assert browser.text("#explain [data-part=answer]") == "400: the body is not valid JSON"
    assert server.bodies[1][1] == b"not json"
    browser.find(form.format("fields")).send_keys("\nno field")
    browser.click("#explain [data-part=submit]")
    answer = "document.querySelector('#explain [data-part=answer]')"
    browser.until(f"{answer}.textContent.includes('no header field')")
    assert len(server.bodies) == 2


def test_a_prefix_is_chosen_in_the_table_and_seen_in_the_ring(
    browser: Browser, server: DashboardServer
) -> None:
    view = server.view = all_ready(8)
    opened(browser, server)
    prefix = view.rings[0].prefixes[0]
    browser.click('#ring [data-part="prefixes"] button')
    assert (
        browser.find('#ring [data-part="prefixes"] button').get_attribute("aria-pressed") == "true"
    )
    assert browser.text('[data-part="middle-0"]') == f"prefix {prefix.name[:8]}"
    homes = "return [...document.querySelectorAll('.arc.is-home')].map((e) => e.dataset.replica)"
    assert browser.js(homes) == [prefix.home]
    browser.js("document.querySelector('#ring [data-part=shares]').open = true")
    shares = browser.until(
        "document.querySelector('#ring [data-part=share-rows]').childElementCount"
    )
    assert shares == len({arc.replica_id for arc in view.rings[0].arcs})


def test_percentiles_that_nobody_has_are_dashes(browser: Browser, server: DashboardServer) -> None:
    view = all_ready(8)
    none = Percentiles()
    classes = tuple(
        msgspec.structs.replace(one, first_token=none, token=none, queue_wait=none, depth=0)
        for one in view.classes
    )
    server.view = changed(view, classes=classes)
    opened(browser, server)
    quantiles = (
        "return [...document.querySelectorAll('#classes tbody .q')].map((e) => e.textContent)"
    )
    assert set(browser.js(quantiles)) == {UNKNOWN}


def test_a_choice_of_theme_is_kept(browser: Browser, server: DashboardServer) -> None:
    opened(browser, server)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.js(ground)
    browser.click("#theme")
    browser.click("#theme")
    assert browser.text("#theme-word") == "dark"
    assert browser.js(ground) != light
    browser.driver.refresh()
    assert browser.js("return document.documentElement.dataset.theme") == "dark"
    assert wait(lambda: browser.text("#theme-word") == "dark", "the theme's word")
    browser.click("#theme")
    assert browser.js(ground) == light
