"""The status page in a real Chromium, by hand: see CONTRIBUTING.md.

Starts a server over a tiny base, does by mouse and keyboard what the page is for, and fails at an
error on the console, at a request to elsewhere and at a violation that axe-core finds. Leaves
screenshots in a folder, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests.server.access.keyring import ACME, OPERATOR, WRONG, write_keys
from tests.server.test_thinking import SOON, TAGS
from tests.server.tiny_server import write_folder
from tests.tiny import lengthen
from tests.tiny_tokenizer import write_tokenizer
from tests.tool_templates import THINKS_ALWAYS

START_S = 120
SIZES = {"wide": (1600, 1000), "middle": (1024, 900), "narrow": (360, 740)}
EXPECTED = {
    "net::ERR_ABORTED",  # a stream that Stop ended
    "Failed to load resource: the server responded with a status of 400 (Bad Request)",
    "Failed to load resource: the server responded with a status of 401 (Unauthorized)",
    "Failed to load resource: the server responded with a status of 403 (Forbidden)",
}
"""What Chromium says of what is refused on purpose here, and of an ended stream."""
LOADED = {"a0": "a0", "a1": "a1", "acme-a": "a2"}
"""Name of an adapter → its folder."""
HOSTILE = "<img src=x onerror=alert(1)>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--serve", nargs="+", default=["-m", "loramux"], help="arguments of python")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox"]
        )
        served = write_folder(Path(folder))
        with serving(served, options.serve) as url:
            use(browser, url)
            for name in SIZES:
                for scheme in ("light", "dark"):
                    look(browser, url, name, scheme, options.out)
        with serving(served, options.serve, f"--keys={write_keys(served)}") as url:
            give_key(browser, url)
            use_as_one_of_many(browser, url)
        lengthen(served / "base")
        write_tokenizer(served / "base", chat_template=THINKS_ALWAYS, more_special=TAGS)
        with serving(served, options.serve) as url:
            think(browser, url, options.out)
        browser.close()
    print("no error on the console, no request to elsewhere, no violation of axe-core")


@contextmanager
def serving(folder: Path, serve: list[str], *flags: str) -> Iterator[str]:
    """A server's URL; some of the folder's adapters are loaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *serve, "serve", "--base", str(folder / "base"), "--device", "cpu"]
    command += ["--http-address", address, "--grpc-address", "127.0.0.1:0"]
    command += ["--adapter-roots", str(folder / "adapters"), "--adapter-store", str(folder / "s")]
    command += [f"--adapter={name}={folder / 'adapters' / path}" for name, path in LOADED.items()]
    process = subprocess.Popen([*command, *flags], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        until_ready(process, f"http://{address}/readyz")
        yield f"http://{address}/"
    finally:
        process.terminate()
        process.wait(30)


def until_ready(process: subprocess.Popen, url: str) -> None:
    for _ in range(START_S * 5):
        assert process.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)


@contextmanager
def opened(browser: Browser, url: str, state: str = "ready", **options) -> Iterator[Page]:
    """The page in a state; in the end the browser must have had nothing to complain of."""
    context = browser.new_context(**options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: m.text in EXPECTED or complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.on("requestfailed", lambda r: r.failure in EXPECTED or complaints.append(r.failure))
    page.on("request", lambda r: r.url.startswith(url) or complaints.append(f"foreign: {r.url}"))
    page.goto(url)
    expect(page.locator("#state")).to_have_text(state)
    yield page
    context.close()
    assert not complaints, complaints


def check_access(page: Page) -> None:
    """axe-core finds no violation."""
    found = Axe().run(page).response["violations"]
    assert not found, json.dumps(found, indent=1)


def row(page: Page, name: str):
    return page.locator("#rows > tr:not(.details)").filter(
        has=page.get_by_role("button", name=name, exact=True)
    )


def use(browser: Browser, url: str) -> None:
    """Load an adapter, try a prompt on it and the base, replace, roll back and unload it."""
    with opened(browser, url, viewport={"width": 1600, "height": 1000}) as page:
        load(page, "guest", "a3")
        expect(page.locator("#adapters-result")).to_have_text("guest is loaded.")
        expect(row(page, "guest").locator(".badge")).to_have_text("loaded")
        try_prompt(page)
        replace_and_roll_back(page)
        unload_by_keyboard(page)
        check_access(page)


def give_key(browser: Browser, url: str) -> None:
    """A key that the server wants is asked for, sent, kept for the tab, and can be forgotten."""
    with opened(browser, url, "connecting") as page:
        dialog = page.locator("#key-dialog")
        for key in (WRONG, OPERATOR):
            expect(dialog).to_contain_text("key")
            check_access(page)
            type_key(page, key)
        expect(page.locator("#state")).to_have_text("ready")
        expect(dialog).to_be_hidden()
        expect(page.locator(".chart").first).to_be_visible()
        page.reload()
        expect(page.locator("#state")).to_have_text("ready")
        page.get_by_role("button", name="API key").click()
        page.get_by_role("button", name="Forget").click()
        expect(page.locator("#trouble")).to_contain_text("this server wants an API key")
        assert page.evaluate("sessionStorage.length + localStorage.length") == 0
        assert page.context.cookies() == []


def use_as_one_of_many(browser: Browser, url: str) -> None:
    """A user sees the adapters of its key, not the others' load, and why it may not load."""
    with opened(browser, url, "connecting") as page:
        type_key(page, ACME)
        expect(page.locator("#rows .opener")).to_have_text(["acme-a"])
        expect(page.locator("#no-load")).to_be_visible()
        expect(page.locator("#charts")).to_be_hidden()
        load(page, "acme-b", "a3")
        expect(page.locator("#adapters-result")).to_contain_text("has the role user")
        row(page, "acme-a").get_by_role("button", name="Try acme-a").click()
        page.get_by_label("Prompt", exact=True).fill("The quick brown fox")
        page.locator("#run").click()
        expect(page.locator("#try-result")).to_have_attribute("data-tone", "good", timeout=30_000)
        check_access(page)


def think(browser: Browser, url: str, out: Path) -> None:
    """What a model thinks stands dimmed before its answer, which is yes or no here."""
    asked = {"structured_outputs": {"choice": ["yes", "no"]}, "logit_bias": SOON}

    def ask_for_form(route: Route) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **asked}))

    for scheme in ("light", "dark"):
        with opened(browser, url, color_scheme=scheme) as page:
            page.route("**/v1/chat/completions", ask_for_form)
            page.get_by_label("Prompt", exact=True).fill("Is there a ship?")
            page.get_by_label("Max tokens").fill("600")
            page.locator("#run").click()
            result = page.locator("#try-result")
            expect(result).to_have_attribute("data-tone", "good", timeout=30_000)
            output, thought = page.locator(".output"), page.locator(".output > .thought")
            whole, thought_text = output.evaluate("e => e.textContent"), thought.inner_text()
            assert len(thought_text) > len("Thought: "), thought_text
            assert whole.removeprefix(thought.evaluate("e => e.textContent")) in ("yes", "no")
            colors = [each.evaluate("e => getComputedStyle(e).color") for each in (output, thought)]
            assert colors[0] != colors[1]
            check_access(page)
            page.screenshot(path=out / f"thought-{scheme}.png", full_page=True)


def type_key(page: Page, key: str) -> None:
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    expect(field).to_have_value("")
    field.fill(key)
    field.press("Enter")


def load(page: Page, name: str, source: str, *, replace: bool = False) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Source", exact=True).fill(source)
    page.get_by_label("Replace", exact=True).set_checked(replace)
    page.get_by_role("button", name="Load", exact=True).click()


def try_prompt(page: Page) -> None:
    row(page, "guest").get_by_role("button", name="Try guest").click()
    row(page, "a0").get_by_role("button", name="Try a0").click()
    page.get_by_label("Prompt", exact=True).fill("The quick brown fox")
    page.get_by_label("Max tokens").fill("48")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#try-result")).to_have_attribute("data-tone", "good", timeout=30_000)
    answers = page.locator(".answer")
    expect(answers).to_have_count(3)
    texts = [answers.nth(index).locator(".output").inner_text() for index in range(3)]
    assert all(texts) and len(set(texts)) == 3, texts
    page.get_by_label("Max tokens").fill("400")
    page.locator("#run").click()
    page.locator("#stop").click()
    expect(page.locator("#try-result")).to_contain_text("was stopped")


def replace_and_roll_back(page: Page) -> None:
    opener = row(page, "guest").get_by_role("button", name="guest", exact=True)
    load(page, "guest", "a4", replace=True)
    back = page.get_by_role("button", name="Roll back guest")
    expect(back).to_be_visible()
    expect(row(page, "guest").locator(".rank")).to_have_text("6")
    back.click()
    expect(page.locator("#adapters-result")).to_contain_text("former content")
    expect(row(page, "guest").locator(".rank")).to_have_text("5")
    opener.click()
    expect(page.locator(".details:visible")).to_contain_text("q_proj")


def unload_by_keyboard(page: Page) -> None:
    page.get_by_role("button", name="Unload guest").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#unload-dialog")).to_be_visible()
    check_access(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Unload guest")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#adapters-result")).to_have_text("guest is unloaded.")
    expect(row(page, "guest")).to_have_count(0)
    expect(page.locator("#adapters-heading")).to_be_focused()


def look(browser: Browser, url: str, name: str, scheme: str, out: Path) -> None:
    """Screenshots in one size and scheme, with a refusal and an answer on them."""
    width, height = SIZES[name]
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with opened(browser, url, **options) as page:
        load(page, "bad", HOSTILE)
        expect(page.locator("#adapters-result")).to_have_attribute("data-tone", "bad")
        row(page, "a1").get_by_role("button", name="Try a1").click()
        page.get_by_label("Prompt", exact=True).fill("What is the name of the ship?")
        page.locator("#run").click()
        expect(page.locator("#try-result")).to_have_attribute("data-tone", "good", timeout=30_000)
        check_access(page)
        page.screenshot(path=out / f"{name}-{scheme}.png", full_page=True)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels wide in a window of {width}"


if __name__ == "__main__":
    main()
