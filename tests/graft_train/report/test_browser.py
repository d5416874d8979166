"""The page in a real browser: it opens from the disk, asks for nothing, and its viewer does what its controls say."""

import re

import pytest

from ...conftest import chromium
from .page_run import HOSTILE

pytestmark = pytest.mark.browser
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
)
PATIENCE = 120_000
"""Milliseconds, as a machine that tests is a busy one."""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # here, since others collect these tests without it

    path = chromium()
    assert path, "there is no Chromium, and CI=true asks for it"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split(), timeout=PATIENCE)
        yield started
        started.close()


@pytest.fixture
def opened(browser, finished_page):
    """Opens the page in a window; in the end nothing may have been fetched, and nothing said on the console."""
    seen = []

    def open_page(width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url != finished_page.as_uri() else None)
        page.goto(finished_page.as_uri())
        page.wait_for_function(
            "document.querySelectorAll('.plot svg').length == document.querySelectorAll('.plot').length"
        )
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    assert seen == []


def shown(page, selector):
    return page.locator(selector).inner_text()


def chosen_round(page):
    return int(re.match(r"Round (\d+) of", shown(page, "#round h3")).group(1)) - 1


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_network_and_fits_the_window(opened, width, scheme):
    page = opened(width, scheme)
    assert page.locator("section").count() == 9
    assert page.locator(".missing").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part < 60)"
    assert page.evaluate(dark) == (scheme == "dark")
    sizes = page.locator("td, p, .token, .node, svg text").evaluate_all(
        "all => all.map(one => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(sizes) >= 11, "text that is too small to read"
    page.click("#theme")
    assert page.evaluate(dark) == (scheme == "light")


def test_what_the_data_say_stays_text(opened):
    page = opened()
    assert "taken over" not in page.title()
    assert page.locator("img").count() == 0
    assert page.locator("#prompt").text_content() == HOSTILE
    assert HOSTILE in page.locator("#tokens").text_content()
    assert HOSTILE in page.locator("#settings").text_content()
    assert repr(HOSTILE) in page.locator("#corpus").text_content()


def test_a_token_opens_its_round(opened):
    page = opened()
    token = page.locator("#tokens [data-round='1']").first
    token.click()
    assert chosen_round(page) == 1
    assert token.get_attribute("aria-pressed") == "true"
    chosen = page.locator(".token.chosen")
    emitted = chosen.count()
    pressed = page.locator("#round [data-method][aria-pressed='true']")
    assert pressed.get_attribute("data-method") == "graft"
    assert f"{emitted} token" in pressed.inner_text()
    # Behind the root stand the accepted nodes and, but for the answer's end, the target's token.
    assert page.locator(".tree .node.accepted").count() == 1 + emitted
    assert page.locator(".tree .node").count() > 1 + emitted, "a tree with rejected nodes"
    assert page.locator(".tree .node small").first.inner_text().endswith("%")
    assert re.search(r"draft steps?|promised", shown(page, "#round .why"))
    assert shown(page, "#round .legend").count(" ms") == 4


def test_another_plan_shows_what_it_would_have_done(opened):
    page = opened()
    assert page.locator("#round [data-method]").evaluate_all("all => all.map(one => one.dataset.method)") == [
        "graft",
        "eagle3",
        "retrieve",
        "autoregressive",
    ]
    page.click("#round [data-method=autoregressive]")
    assert page.locator(".tree .node").count() == 2, "the root, and the target's token"
    assert "drafts nothing" in shown(page, "#round .why")
    for key, method in (("3", "retrieve"), ("2", "eagle3")):
        page.keyboard.press(key)
        assert page.locator(f"#round [data-method={method}]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("ArrowRight")
    assert chosen_round(page) == 1
    page.click("[aria-label='the round before']")
    assert chosen_round(page) == 0
    hues = page.locator(".tree .node:not(.default)").evaluate_all("all => all.map(one => one.classList[1])")
    assert set(hues) == {"green"}, "the head alone proposes"


def test_filters_leave_the_rounds_that_are_asked_for(opened):
    page = opened()
    every = page.locator("#tokens [data-round]").evaluate_all(
        "all => all.map(one => [Number(one.dataset.round), one.title])"
    )
    rounds = {number: {source for place, source in every if place == number} for number, _ in every}
    page.check("#rejected")
    rejected = [number for number, sources in rounds.items() if sources == {"target"}]
    assert 0 < len(rejected) < len(rounds)
    assert shown(page, "#matches") == f"{len(rejected)} of {len(rounds)} rounds"
    assert chosen_round(page) in rejected
    clear = page.locator("#tokens [data-round]:not(.dim)").evaluate_all(
        "all => all.map(one => Number(one.dataset.round))"
    )
    assert sorted({*clear}) == rejected
    page.click("#sources button:has-text('head')")
    assert shown(page, "#matches") == f"0 of {len(rounds)} rounds"
    assert shown(page, "#round") == "No round is as asked."
    page.uncheck("#rejected")
    by_head = [number for number, sources in rounds.items() if "head" in sources]
    assert shown(page, "#matches") == f"{len(by_head)} of {len(rounds)} rounds"
    page.select_option("#answer", "1")
    assert page.locator("#sources button[aria-pressed=true]").count() == 1, "filters outlive a change of the answer"


def test_keys_go_from_round_to_round(opened):
    page = opened()
    page.locator("#tokens [data-round='0']").first.focus()
    last = int(page.locator("#tokens [data-round]").last.get_attribute("data-round"))
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last), ("Home", 0)):
        page.keyboard.press(key)
        assert chosen_round(page) == expected
        assert page.evaluate("document.activeElement.dataset.round") == str(expected)
    page.keyboard.press("ArrowLeft")
    assert chosen_round(page) == 0, "there is none before the first"
    assert page.locator("#tokens [tabindex='0']").count() == 1, "one stop for Tab"
