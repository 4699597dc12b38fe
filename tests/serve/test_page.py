"""The playground in a real browser, against the real server over a tiny model."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from itertools import pairwise
from queue import Queue
from typing import Any

import pytest

from kveraser.serve.access import Keys
from kveraser.serve.app import Settings
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.service import Service
from tests.serve_fake import FakeService, listening
from tests.tiny import tiny_backbone

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium, chromium-browser or google-chrome")

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
CONVERSATION = (
    "User: Where is my parcel?\nAssistant: It is in Rome, on shelf 44.\nUser: Who says so?\nAssistant: The depot."
)
DOCUMENT = "The ship left at noon. The captain is Ada. She keeps the log in the cabin, and the crew sleeps."
HOSTILE = '<img src=x onerror="document.title=1"> <script>document.title=2</script> &amp; ' + "long" * 60
REFUSED = "Failed to load resource"
"""How the console tells of a request that the server refused: the page shows it as well."""

NAMED = {
    "button", "textbox", "searchbox", "spinbutton", "checkbox", "radio", "combobox", "listbox", "option", "link",
    "region", "article", "image", "DisclosureTriangle",
}  # fmt: skip
"""Roles that mean nothing without a name."""

Running = Callable[[], AbstractAsyncContextManager[Service]]


@asynccontextmanager
async def tiny() -> AsyncIterator[Service]:
    """A real service; the application closes it."""
    engine = TransformersEngine(tiny_backbone(seed=3, max_position_embeddings=8192), "repair(2)")
    yield Service(engine, Scheduler(engine), method="repair(2)")


@contextmanager
def running(made: Running, settings: Settings | None = None) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    told: Queue[tuple[str, Callable[[], Any]]] = Queue()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with made() as service, listening(service, settings) as (host, port):
            told.put((f"http://{host}:{port}/", lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    address, stop = told.get(timeout=60)
    try:
        yield address
    finally:
        stop()
        thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(tiny) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **settings: Any) -> Iterator[Any]:
    """The page. An error of its scripts, and a request to anywhere else, fail the test."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | settings))
    page, wrong = context.new_page(), list[str]()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: told.type == "error" and REFUSED not in told.text and wrong.append(told.text))
    page.on("request", lambda asked: asked.url.startswith(address) or wrong.append(asked.url))
    try:
        page.goto(address)
        yield page
        assert wrong == []
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        page.wait_for_selector(".example")
        yield page


def paste(page: Any, text: str) -> None:
    """Have a text read."""
    page.locator("#own").evaluate("details => { details.open = true; }")
    page.fill("#own-text", text)
    page.click("#own-form button")
    page.wait_for_selector("#reading:focus")


def served(page: Any, rest: str = "", body: Any = None) -> Any:
    """What the server itself says of the page's session."""
    return page.evaluate(
        """async ([rest, body]) => {
            const path = `/v1/sessions/${new URL(location.href).searchParams.get("session")}${rest}`;
            const headers = { "Content-Type": "application/json" };
            const sent = body === null ? {} : { method: "POST", headers, body: JSON.stringify(body) };
            return (await fetch(path, sent)).json();
        }""",
        [rest, body],
    )


def marked(page: Any, attribute: str) -> str:
    """The text of the tokens that have an attribute."""
    return "".join(page.locator(f"#transcript [role=option]{attribute}").all_text_contents())


def token(page: Any, text: str, number: int = 0) -> Any:
    """The first token of a place in the text."""
    place = page.evaluate(
        """([text, number]) => {
            const nodes = [...document.querySelectorAll("#transcript [role=option]")];
            const whole = nodes.map((node) => node.textContent).join("");
            let at = -1;
            for (let count = 0; count <= number; count += 1) at = whole.indexOf(text, at + 1);
            let reached = 0;
            return nodes.find((node) => (reached += node.textContent.length) > at).id;
        }""",
        [text, number],
    )
    return page.locator(f"#{place}")


def drag(page: Any, first: Any, last: Any) -> None:
    """Select with the mouse, from the left of one token to the right of another."""
    first.scroll_into_view_if_needed()
    start, end = first.bounding_box(), last.bounding_box()
    page.mouse.move(start["x"] + 1, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] - 1, end["y"] + end["height"] / 2, steps=5)
    page.mouse.up()


def erase(page: Any) -> None:
    before = page.locator("#timeline li").count()
    page.click("#erase-button")
    page.wait_for_selector(f"#timeline li:nth-child({before + 1})")


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.fill("#most", "12")
    page.click("#ask-button")


def announced(page: Any, text: str) -> None:
    page.wait_for_selector(f"#announcer:has-text({json.dumps(text)})", state="attached")


def test_read_select_erase_compare_and_undo(page: Any) -> None:
    paste(page, CONVERSATION)
    assert page.locator(".message").count() == 4 and page.locator(".role").all_text_contents()[1] == "assistant"
    drag(page, token(page, "in Rome"), token(page, "e, on"))
    assert marked(page, "[aria-selected=true]") == "in Rome"
    assert f"{page.locator('[aria-selected=true]').count()} tokens selected" in page.inner_text("#selected")
    erase(page)
    gone = "".join(token["text"] for token in served(page, "/tokens")["data"] if not token["live"])
    assert gone == marked(page, ".erased") == "in Rome"
    (receipt,) = served(page)["receipts"]
    assert receipt["method"] == "repair" and receipt["parameters"]["window"] == 2
    assert "repair(window=2" in page.inner_text("#receipt") and "approximate" in page.inner_text("#receipt")
    assert "Erased" in page.inner_text("#timeline li[aria-current=step]")

    ask(page, "Where?")
    page.wait_for_selector("#distance .strip")
    said = {}
    for name in ("unerased", "edited", "exact"):
        said[name] = served(page, "/ask", {"question": "Where?", "max_tokens": 12, "caches": name})["text"]
        assert page.locator(f".answer.{name} .said").evaluate("node => node.textContent") == said[name]
    assert len(set(said.values())) == 3
    assert page.locator("#times tr").count() == 3 and "the erase" in page.inner_text("#times tr:nth-child(2)")
    (probe,) = served(page, "/audit", {"probes": ["Where?"]})["audit"]["probes"]
    cells = page.locator("#distance .strip .cell")
    assert cells.count() == len(probe["by_token"]) == page.locator("#distance tbody tr").count()
    highest = max(max(one["kl"], one["kl_unerased"]) for one in probe["by_token"])
    heights = cells.locator(".bar.edited").evaluate_all("bars => bars.map((bar) => bar.getBoundingClientRect().height)")
    tallest = page.locator("#distance .bars").first.bounding_box()["height"] - 1
    for height, one in zip(heights, probe["by_token"], strict=True):
        assert height == pytest.approx(max(1, tallest * (one["kl"] / highest) ** 0.5), abs=1.5)
    assert "in nats" in page.get_attribute("#distance .strip", "aria-label")

    page.click("#undo")
    page.wait_for_selector("#timeline .undone")
    assert marked(page, ".erased") == "" and served(page)["receipts"] == []
    assert page.is_disabled("#undo") and page.inner_text("#receipt") == ""
    # The answers are those of the erased cache still, and say so.
    assert page.is_visible("#answers-stale")
    ask(page, "Where?")
    page.wait_for_selector("#times tr:only-child")
    assert page.is_hidden("#answers-stale")
    assert page.locator("#times tr").count() == 1
    assert page.locator(".answer.edited .said").evaluate("node => node.textContent") == said["unerased"]


def test_everything_with_the_keyboard(page: Any) -> None:
    paste(page, DOCUMENT)
    page.focus("#transcript [role=listbox]")
    at = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).textContent"
    page.keyboard.press("ArrowRight")
    second = page.evaluate(at)
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(at) == "T" != second and marked(page, "[aria-selected=true]") == ""
    for key in ("Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    chosen = page.locator("[aria-selected=true]").count()
    assert chosen == 3 and DOCUMENT.startswith(marked(page, "[aria-selected=true]"))
    announced(page, f"{chosen} tokens selected")
    page.keyboard.press("Escape")
    assert marked(page, "[aria-selected=true]") == "" and page.is_disabled("#erase-button")
    page.keyboard.press("Control+a")
    assert marked(page, "[aria-selected=true]") == DOCUMENT
    page.keyboard.press("End")
    assert page.evaluate(at) == "." and marked(page, "[aria-selected=true]") == ""
    page.keyboard.press("Space")
    assert marked(page, "[aria-selected=true]") == "."
    page.keyboard.press("Shift+Home")
    assert marked(page, "[aria-selected=true]") == DOCUMENT
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowDown")
    line = marked(page, "[aria-selected=true]")
    assert len(line) > 30 and DOCUMENT.startswith(line)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "erase-button"
    page.keyboard.press("Enter")
    announced(page, "Erased")
    assert marked(page, ".erased") == line
    # The next token that can be stood on is still there, and says of an erased one what it is.
    assert page.locator(".erased").first.get_attribute("aria-label").endswith(", erased")
    page.focus("#question")
    page.keyboard.type("Who?")
    page.fill("#most", "3")
    page.keyboard.press("Enter")
    announced(page, "Exact:")
    page.wait_for_selector("#distance .strip")
    page.focus("#undo")
    page.keyboard.press("Enter")
    announced(page, "Undone")


def test_a_message_by_its_button_and_a_text_by_finding_it(page: Any) -> None:
    paste(page, CONVERSATION)
    page.click("[aria-label='Select assistant, message 2']")
    assert marked(page, "[aria-selected=true]").startswith("<|im_start|>assistant\nIt is in Rome")
    erase(page)
    assert not served(page, "?contents=true")["messages"][1]["live"]
    assert "erased" in page.inner_text(".message:nth-of-type(2) h3")
    assert page.is_disabled("[aria-label='Select assistant, message 2']")
    page.fill("#find-text", "WHO")
    page.keyboard.press("Enter")
    assert marked(page, "[aria-selected=true]") == "Who"
    page.fill("#find-text", "Rome")
    page.keyboard.press("Enter")
    assert "not in the text that is left" in page.inner_text("#find-error")
    # Hidden, erased text leaves a mark.
    page.uncheck("#show-erased")
    assert page.locator(".erased.first").evaluate("node => getComputedStyle(node, '::before').content") != "none"
    page.check("input[name=shown][value=tokens]")
    assert page.locator(".template").first.is_visible()


def test_every_method_and_its_numbers(page: Any) -> None:
    paste(page, DOCUMENT)
    names = page.locator("#method option").evaluate_all("options => options.map((option) => option.value)")
    assert names == ["repair", *[name for name in names if name not in ("repair", "auto")], "auto"]
    assert {"recompute", "mask", "shift"} <= set(names) and "kveraser" not in names
    for name in names:
        page.select_option("#method", name)
        if name == "repair":
            page.fill("input[name=window]", "4")
        if name == "auto":
            page.fill("input[name=max_kl]", "100")
        page.fill("#find-text", "captain")
        page.click("#find button")
        erase(page)
        receipt = served(page)["receipts"][-1]
        if receipt["requested"] is None:
            assert receipt["method"] == name or name == "auto"
        else:
            # In a text this short some cost as much as exact recomputation.
            assert receipt["method"] == "recompute" and receipt["requested"].partition("(")[0] == name
        assert name != "repair" or receipt["parameters"]["window"] == 4
        page.click("#undo")
        page.wait_for_selector("#receipt:empty", state="attached")
        page.wait_for_selector("#erase-form[aria-busy=false]")
    page.select_option("#method", "mask")
    page.uncheck("#undoable")
    page.click("#find button")
    erase(page)
    assert served(page)["undo_steps"] == 0 and page.is_disabled("#undo")
    assert "nothing" in page.inner_text("#receipt")


def test_an_audit_and_the_way_back(page: Any) -> None:
    paste(page, DOCUMENT)
    assert page.is_disabled("#audit-button")
    page.select_option("#method", "mask")
    for text in ("Ada", "noon"):
        page.fill("#find-text", text)
        page.click("#find button")
        erase(page)
    page.fill("#probes", "Who is the captain?")
    page.fill("#secrets", "Ada\nnoon")
    page.click("#audit-button")
    page.wait_for_selector("#audited .probe")
    assert page.locator("#audited .probe").count() == 2 and page.locator("#audited .verdict").count() == 1
    audit = served(page)["receipts"][-1]["audit"]
    shown = page.inner_text("#audited dl")
    assert f"{audit['kl']:.4f}" in shown or f"{audit['kl']:.2f}" in shown
    assert [probe["kind"] for probe in audit["probes"]] == ["influence", "leak"]
    assert "audited: KL" in page.inner_text("#timeline li[aria-current=step]")
    page.locator("#audited .probe summary").first.click()
    assert page.locator("#audited .strip").first.is_visible()
    page.locator("#timeline li", has_text="Read").get_by_role("button").click()
    page.wait_for_selector("#timeline .undone >> nth=1")
    assert served(page)["receipts"] == [] and marked(page, ".erased") == ""


def test_an_example_knows_its_span_and_questions_and_comes_back(page: Any) -> None:
    page.click(".example[data-name=preference]")
    page.wait_for_selector("#reading:focus")
    page.click("#suggest")
    assert "There is a change." in marked(page, "[aria-selected=true]")
    box = page.locator("[aria-selected=true]:not(.template)").first.bounding_box()
    shown = page.locator("#transcript").bounding_box()
    assert shown["y"] < box["y"] < shown["y"] + shown["height"], "it was scrolled to"
    erase(page)
    assert [message["live"] for message in served(page)["messages"]].index(False) == 3
    assert page.locator("#suggestions button").count() == 5
    page.reload()
    page.wait_for_selector("#timeline li:nth-child(2)")
    assert "There is a change." in marked(page, ".erased")
    page.click(".example[data-name=handbook]")
    page.wait_for_selector("#transcript [data-role=document]")
    page.click("#suggest")
    assert marked(page, "[aria-selected=true]").startswith("[3] Employee handbook")
    assert page.inner_text("#receipt") == "" and page.locator("#timeline li").count() == 1


def test_what_is_wrong_is_told_where_it_happened(page: Any) -> None:
    paste(page, DOCUMENT)
    page.fill("#find-text", "noon")
    page.click("#find button")
    page.select_option("#method", "repair")
    page.fill("input[name=window]", "0")
    page.click("#erase-button")
    page.wait_for_selector("#erase-error:not(:empty)")
    assert "window" in page.inner_text("#erase-error") and marked(page, ".erased") == ""
    page.fill("input[name=window]", "8")
    erase(page)
    assert page.inner_text("#erase-error") == ""
    # Undone from elsewhere: the conflict is told, and what can't be done any more is disabled.
    assert served(page, "/undo", {"steps": 1})["undo_steps"] == 0
    page.click("#undo")
    page.wait_for_selector("#erase-error:not(:empty)")
    assert page.is_disabled("#undo") and page.is_disabled("#audit-button") and marked(page, ".erased") == ""
    page.wait_for_selector("#ask-button:enabled")
    assert page.is_disabled("#undo") and page.inner_text("#erase-error") != ""
    page.evaluate("fetch(`/v1/sessions/${new URL(location.href).searchParams.get('session')}`, { method: 'DELETE' })")
    ask(page, "Where?")
    page.wait_for_selector("#ask-error:not(:empty)")
    assert "no session" in page.inner_text("#ask-error") and page.is_enabled("#ask-button")


def test_texts_are_only_ever_texts(page: Any) -> None:
    paste(page, f"User: {HOSTILE}\nAssistant: {HOSTILE}")
    assert HOSTILE in marked(page, "") and page.locator("#transcript img, #transcript script").count() == 0
    page.fill("#find-text", "onerror")
    page.click("#find button")
    erase(page)
    ask(page, HOSTILE)
    page.wait_for_selector("#distance .strip")
    page.fill("#probes", HOSTILE)
    page.click("#audit-button")
    page.wait_for_selector("#audited .probe")
    assert page.locator("main img, main script").count() == 0 and page.title() == "kveraser playground"


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        (CONVERSATION, "conversation", 4),
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b: c"}]', "conversation", 2),
        ('{"messages": [{"role": "user", "content": "a"}]}', "conversation", 1),
        (DOCUMENT, "document", 1),
        ("Note: this is\nUser: no conversation", "document", 1),
        ('{"messages": 3}', "document", 1),
    ],
)
def test_pasted_texts_are_recognised(page: Any, text: str, kind: str, count: int) -> None:
    page.locator("#own").evaluate("details => { details.open = true; }")
    page.fill("#own-text", text)
    assert page.is_checked(f"input[name=kind][value={kind}]")
    page.click("#own-form button")
    page.wait_for_selector("#reading:focus")
    assert page.locator(".message").count() == count


def test_while_it_answers_nothing_else_can_be_done_and_stop_stops(browser: Any) -> None:
    fake = FakeService()

    @asynccontextmanager
    async def waiting() -> AsyncIterator[Service]:
        fake.gate = asyncio.Event()
        yield fake

    with running(waiting) as address, opened(browser, address) as page:
        page.wait_for_selector(".example")
        paste(page, DOCUMENT)
        page.fill("#find-text", "The")
        page.click("#find button")
        page.focus("#question")
        ask(page, "Where?")
        # Shown while the rest is still to come.
        page.wait_for_selector(".answer.edited .said:text-is('Rome, shelf 44')")
        assert page.get_attribute(".answer.edited", "aria-busy") == "true"
        for control in ("#ask-button", "#erase-button", "#undo", ".example >> nth=0"):
            assert page.is_disabled(control)
        page.click("#stop")
        page.wait_for_selector("#ask-button:enabled")
        announced(page, "Stopped")
        assert page.inner_text("#ask-error") == "" and page.is_enabled("#erase-button")
    assert fake.cancelled == 1


def test_a_server_with_keys_is_asked_with_one(browser: Any) -> None:
    @asynccontextmanager
    async def fake() -> AsyncIterator[Service]:
        yield FakeService()

    settings = Settings(keys=Keys(["alice-0123456789"]))
    with running(fake, settings) as address, opened(browser, address) as page:
        page.wait_for_selector("#key-input:focus")
        assert page.inner_text("#key .error") == "" and page.locator(".example").count() == 0
        page.fill("#key-input", "mallory-0123456789")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key .error:not(:empty)")
        page.fill("#key-input", "alice-0123456789")
        page.keyboard.press("Enter")
        page.wait_for_selector(".example")
        assert page.is_hidden("#key")
        paste(page, DOCUMENT)
        # It is not in the address, and outlives a reload only in this tab.
        assert "alice" not in page.url
        page.reload()
        page.wait_for_selector(".message")


# How it looks, and to whom


def filled(page: Any) -> None:
    """All parts of the page, with something in them."""
    paste(page, f"User: {'word ' * 30}{'x' * 200}\nAssistant: In Rome, shelf 44.\nUser: {DOCUMENT}")
    page.fill("#find-text", "shelf 44")
    page.click("#find button")
    page.select_option("#method", "mask")
    erase(page)
    ask(page, "Where is the parcel, " + "x" * 80 + "?")
    page.wait_for_selector("#distance .strip")
    page.click("#audit-button")
    page.wait_for_selector("#audited .probe")
    page.evaluate("document.querySelectorAll('#work details').forEach((details) => { details.open = true; })")
    page.fill("#find-text", "Rome")
    page.click("#find button")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_phone_width_nothing_is_cut_off_and_all_of_it_is_legible(browser: Any, address: str, scheme: str) -> None:
    with opened(browser, address, viewport={"width": 340, "height": 700}, color_scheme=scheme, has_touch=True) as page:
        page.wait_for_selector(".example")
        filled(page)
        for shown in ("tokens", "text"):
            page.check(f"input[name=shown][value={shown}]")
            assert page.evaluate("document.documentElement.scrollWidth") == 340
            wide = page.evaluate(
                """[...document.querySelectorAll("body *")].filter((node) => !node.closest(".announcer, .scroll, .skip")
                    && node.getBoundingClientRect().right > innerWidth).map((node) => node.outerHTML.slice(0, 80))"""
            )
            assert wide == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") is (scheme == "light")
        assert page.evaluate(FAINT) == []
        page.tap("#transcript [role=option]:not(.template):not(.erased) >> nth=3")
        assert page.locator("[aria-selected=true]").count() == 1


FAINT = """(() => {
    // Texts whose colour has less than 4.5 times the luminance of what lies behind them, or the other way round.
    const read = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
    const light = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
        .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (node) => {
        for (let over = node; over; over = over.parentElement) {
            const colour = getComputedStyle(over).backgroundColor;
            const rgb = read(colour);
            if (colour.startsWith("rgb") && (rgb.length === 3 || rgb[3] === 1)) return rgb;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll("body *")].filter((node) => {
        const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
        if (!own || !node.getClientRects().length || node.closest(":disabled, .announcer, .skip")) return false;
        const [one, other] = [light(read(getComputedStyle(node).color)), light(behind(node))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05) < 4.5;
    }).map((node) => node.outerHTML.slice(0, 100));
})()"""


def test_every_part_has_a_name_and_every_control_is_reached_in_order(page: Any) -> None:
    filled(page)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in tree if not node["ignored"]]
    roles = [node["role"]["value"] for node in shown]
    assert {"main", "banner", "region", "listbox", "option", "image", "table"} <= set(roles)
    nameless = [
        node["role"]["value"] for node in shown
        if node["role"]["value"] in NAMED and not node.get("name", {}).get("value", "").strip()
    ]  # fmt: skip
    assert nameless == []
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((node) => Number(node.tagName[1]))")
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(set(ids)) == len(ids)

    page.evaluate("document.activeElement.blur(); scrollTo(0, 0);")
    page.locator("body").evaluate("body => { body.tabIndex = -1; body.focus(); body.removeAttribute('tabindex'); }")
    while True:
        page.keyboard.press("Tab")
        told = page.evaluate(
            """() => {
                const node = document.activeElement;
                if (node === document.body || node === document.documentElement) return null;
                const before = window.focusedBefore;
                window.focusedBefore = node;
                node.dataset.reached = "";
                const behind = Node.DOCUMENT_POSITION_FOLLOWING;
                const follows = !before || (before.compareDocumentPosition(node) & behind) > 0;
                const box = node.getBoundingClientRect();
                return { follows, outline: getComputedStyle(node).outlineStyle, what: node.outerHTML.slice(0, 80),
                    seen: box.bottom > 0 && box.top < innerHeight };
            }"""
        )
        if told is None or not told["follows"]:
            break
        assert told["outline"] != "none" and told["seen"], told["what"]
    missed = page.evaluate(
        """[...document.querySelectorAll("a, button, input, select, textarea, summary, [tabindex='0']")]
            .filter((node) => !node.disabled && node.checkVisibility() && !("reached" in node.dataset))
            .filter((node) => node.type !== "radio" || node.checked).map((node) => node.outerHTML.slice(0, 90))"""
    )
    assert missed == []


def test_the_page_is_served_strictly(page: Any, address: str) -> None:
    for name in ("", "page/main.js", "page/style.css", "page/examples.json"):
        answered = page.request.get(address + name)
        assert answered.ok and "default-src 'none'" in answered.headers["content-security-policy"]
    assert page.request.get(address + "page/../app.py").status == 404
    assert page.request.get(address + "page/missing.js").status == 404
