"""The page of a server, in a browser."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from growlm.server.keys import Keys
from growlm.store import Store
from servers import Served, serving, wait_for
from stores import domain_text, make_store
from test_server_jobs import text_of

CHROMIUM = os.environ.get("GROWLM_CHROMIUM") or shutil.which("chromium")  # the variable: it has to be there
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: install it to test the page"),
]
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
DIGITS, SIGNS = domain_text("digits", 77), domain_text("signs", 77)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    make_store(tmp_path, "llama", {"letters": {"kind": "lora", "r": 4}, "digits": {"kind": "lora", "r": 4}})
    with serving(tmp_path / "store", keys=Keys(["user"]), admin_keys=Keys(["root"]), engine={"memory": "64MB"}) as one:
        one.engine._loop.writer.end_tokens = set()
        yield one


class Watched:
    """A page that asks nobody but its server, and in which nothing goes wrong that nobody has foreseen."""

    def __init__(self, browser: Any, served: Served, key: str = "", **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(20_000)
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(said.text))
        self.url = served.url
        self.page.goto(f"{served.url}/#key={key}" if key else served.url)

    def ask(self, text: str) -> Any:
        """The answer's turn, once it has ended."""
        before = self.page.locator(".turn.assistant").count()
        self.page.get_by_label("Your question").fill(text)
        self.page.keyboard.press("Enter")
        turn = self.page.locator(".turn.assistant").nth(before)
        turn.locator(".about :first-child").wait_for()
        return turn

    def is_well(self, *, foreseen: str = "^$") -> None:
        assert all(url.startswith((self.url, "data:,")) for url in self.asked), self.asked
        assert [one for one in self.wrong if not re.search(foreseen, one)] == []
        self.page.close()


def test_an_answer_names_its_module_and_how_sure_the_router_was(browser, served):
    watched = Watched(browser, served, "root")
    page = watched.page
    assert "key" not in page.url  # it is not left in the address
    turn = watched.ask(DIGITS)
    assert turn.locator(".about b").inner_text() == "digits"
    assert re.search(r"\d % sure.* tokens, the first after", turn.locator(".about").inner_text())
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Who answers").select_option("letters")
    turn = watched.ask(DIGITS)
    assert turn.locator(".about").inner_text().startswith("letters, as you asked")
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    watched.is_well()


def test_an_answer_comes_while_it_is_written_and_can_be_stopped(browser, served, monkeypatch):
    write = served.engine._loop.writer.write
    monkeypatch.setattr(served.engine._loop.writer, "write", lambda *a: time.sleep(0.1) or write(*a))
    watched = Watched(browser, served, "user")
    page = watched.page
    page.get_by_label("Your question").fill("abc de")
    page.get_by_role("button", name="Send").click()
    wait_for(lambda: len(page.locator(".turn.assistant .said").text_content()) > 3)
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    length = len(page.locator(".turn.assistant .said").inner_text())
    page.wait_for_timeout(400)
    assert len(page.locator(".turn.assistant .said").inner_text()) == length
    assert served.engine._loop.scheduler.idle
    watched.is_well(foreseen="401")


def test_a_server_that_asks_for_a_key_is_given_one_in_the_page(browser, served):
    watched = Watched(browser, served)
    page = watched.page
    page.get_by_text("asks for a key").wait_for()
    page.get_by_role("button", name="Key").click()
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("This key is wrong").wait_for()
    page.get_by_role("button", name="Key").click()
    page.get_by_label("Key", exact=True).fill("user")
    page.keyboard.press("Enter")
    page.get_by_text("This key is wrong").wait_for(state="hidden")
    assert watched.ask(DIGITS).locator(".about b").inner_text() == "digits"
    assert page.locator("#notice").is_hidden()
    page.get_by_role("tab", name="Teach").click()
    page.get_by_text("takes the admin key").wait_for()
    assert page.locator("#teach-form").is_hidden()
    page.get_by_role("tab", name="Modules").click()
    page.get_by_role("heading", name="digits").wait_for()
    assert page.get_by_role("button", name="pin digits").count() == 0
    watched.is_well(foreseen="401")


def test_modules_and_memory_are_shown_as_they_are(browser, served):
    watched = Watched(browser, served, "root")
    page = watched.page
    page.get_by_role("tab", name="Modules").click()
    letters = page.locator("[data-module=letters]")
    letters.get_by_text("on the disk").wait_for()
    page.get_by_role("button", name="pin letters").click()
    letters.get_by_text("pinned").wait_for()
    assert served.engine.modules.kept == ["letters"]
    wait_for(lambda: re.search(r"of 64.0 MB: base .* modules ", page.locator("#memory-told").inner_text()))
    page.get_by_role("button", name="unpin letters").click()
    page.get_by_role("button", name="evict letters").click()
    letters.get_by_text("on the disk").wait_for()
    assert served.engine.modules.resident == []
    page.get_by_role("button", name="ask letters").click()
    assert page.get_by_label("Who answers").input_value() == "letters"
    watched.is_well()


def test_a_file_that_is_dropped_becomes_a_module_that_answers(browser, served, tmp_path):
    (tmp_path / "signs.txt").write_text(text_of("signs"))
    watched = Watched(browser, served, "root")
    page = watched.page
    page.get_by_role("tab", name="Teach").click()
    page.set_input_files("#files", tmp_path / "signs.txt")
    assert page.get_by_label("Name of the module").input_value() == "signs"
    page.get_by_label("a blank line ends a document").check()
    page.get_by_text("More").click()
    page.get_by_label("Tokens in all").fill("3000")
    page.get_by_label("Tokens a row").fill("64")
    page.get_by_label("Kind").select_option("lora")
    page.get_by_role("button", name="Learn", exact=True).click()
    job = page.locator("[data-job]").first
    job.get_by_text("it has learned, and answers from now on").wait_for(timeout=90_000)
    assert job.locator(".tag").inner_text() == "done"
    assert job.locator(".sample").count() == 3
    assert job.locator(".curve svg").get_attribute("aria-label").startswith("loss from ")
    high, low = (float(job.locator(f".curve .{end}").inner_text()) for end in ("high", "low"))
    assert high > low > 0
    assert re.fullmatch(r"[1-9]\d* steps", job.locator(".curve .last").inner_text())
    assert "read: 80 documents" in job.locator("pre").text_content()
    job.get_by_role("button", name="Ask signs").click()
    wait_for(lambda: page.get_by_label("Who answers").input_value() == "signs")
    page.get_by_label("Who answers").select_option("auto")
    assert watched.ask(SIGNS).locator(".about b").inner_text() == "signs"
    # What cannot be is told, and what was chosen is still there.
    page.get_by_role("tab", name="Teach").click()
    (tmp_path / "bomb.zip").write_bytes(b"PK")
    page.set_input_files("#files", tmp_path / "bomb.zip")
    page.get_by_role("button", name="Learn", exact=True).click()
    page.get_by_role("alert").get_by_text("bomb.zip: files of the kind .zip are not read; leave it out").wait_for()
    assert page.locator("#file-list li.wrong").count() == 1
    page.get_by_role("button", name="leave out bomb.zip").click()
    page.set_input_files("#files", tmp_path / "signs.txt")
    page.get_by_label("Name of the module").fill("signs")
    page.get_by_role("button", name="Learn", exact=True).click()
    page.get_by_role("alert").get_by_text("signs is there already: tick “the next version”").wait_for()
    page.get_by_role("button", name="Learn", exact=True).click()
    page.get_by_role("alert").get_by_text("signs is there already").wait_for()
    sent = served.http.get("/admin/files", headers={"Authorization": "Bearer root"}).json()["data"]
    assert len(sent) == 1  # it is sent once, and the one that was learned from is let go of
    page.reload()  # jobs are the server's
    page.get_by_role("tab", name="Teach").click()
    page.locator("[data-job]").get_by_text("it has learned").wait_for()
    watched.is_well(foreseen="409")


def test_a_conversation_that_is_full_says_so_and_can_be_begun_anew(browser, served):
    watched = Watched(browser, served, "user")
    page = watched.page
    watched.ask("abc de")  # its answer fills what the base reads
    turn = watched.ask("abc de")
    assert "or begin a new chat" in turn.locator(".about").inner_text()
    page.get_by_role("button", name="New chat").click()
    page.locator(".hint").first.wait_for()
    assert watched.ask("abc de").locator(".about b").count() == 1
    watched.is_well(foreseen="401|400")


def test_a_module_is_removed_in_the_page(browser, served):
    watched = Watched(browser, served, "root")
    page = watched.page
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("tab", name="Modules").click()
    page.get_by_role("button", name="remove letters").click()
    page.locator("[data-job]").get_by_text("It is gone.").wait_for()
    wait_for(lambda: "letters" not in served.engine.router.names)
    watched.is_well()


def test_what_is_said_is_text_and_nothing_else(browser, served, monkeypatch):
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    decode = type(served.engine.tokenizer).decode
    monkeypatch.setattr(type(served.engine.tokenizer), "decode", lambda *a, **k: evil + decode(*a, **k))
    watched = Watched(browser, served, "user")
    turn = watched.ask(f"{evil} 012")
    assert watched.page.locator(".turn img, .turn.user b, .said b").count() == 0
    assert "<b>bold</b>" in turn.locator(".said").inner_text()
    assert watched.page.locator(".turn.user .said").inner_text() == f"{evil} 012"
    watched.is_well(foreseen="401")


def test_everything_is_reached_by_keyboard(browser, served):
    watched = Watched(browser, served, "root")
    page = watched.page
    page.get_by_role("tab", name="Chat").focus()
    for name in ("modules", "teach", "chat", "modules"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{name}"
        assert page.locator(f"#{name}").is_visible()
    page.locator("[data-module=letters]").wait_for()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert {"ask letters", "pin letters", "evict letters", "ask digits"} <= reached
    watched.is_well()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone(browser, served, scheme, tmp_path: Path):
    watched = Watched(browser, served, "root", viewport={"width": 360, "height": 640}, color_scheme=scheme)
    page = watched.page
    watched.ask("0 " * 30 + "x" * 80)
    for name in ("Chat", "Modules", "Teach"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        inside = "[...document.querySelectorAll('section:not([hidden]) *')]"
        far = page.evaluate(f"{inside}.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.id)")
        assert far == [], name
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) > 7
    watched.is_well()


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_store_is_whole_after_all_this(served):
    assert Store.open(served.engine.store.path).verify() == []
