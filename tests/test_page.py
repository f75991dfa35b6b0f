"""The page in a real browser: upload, ask, listen to the place, another L, an error, a phone, the dark theme.

Needs playwright and Debian's `chromium`. SCREENSHOTS=docs writes the pictures of the pages into that folder.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastlongspeech.app.session import Session

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "fastlongspeech-demo"
RECORDING = ROOT / "demo" / "recording.flac"
SPACE = ROOT / "app" / "space"
QUESTION = "When does Patrick arrive?"
WAIT = 120_000  # milliseconds; a busy machine is slow

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's package chromium")


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(DEMO, max_new_tokens=20)


@pytest.fixture(scope="module")
def address(session) -> Iterator[str]:
    from fastlongspeech.app.page import build, launch

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(session)
    launch(page, prevent_thread_lock=True, quiet=True, server_port=None)
    yield str(page.local_url)
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    return Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("shots"))


def upload(page, recording: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(str(recording))


@needs_chromium
def test_a_visit(address, browser, session, shots):
    """Everything in one visit, because the recording is listened to once."""
    encoded = []
    hook = session.model.get_encoder("audio").register_forward_hook(lambda *_: encoded.append(1))
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(address)

    # Without a recording, a question is answered by a sentence.
    page.locator("#question textarea").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("There is no recording yet: upload one, record one, or take an example.").wait_for()

    upload(page, RECORDING)
    picture = page.locator(".picture svg[role=img]")
    picture.wait_for()
    assert picture.get_attribute("aria-label") == "Waveform, content density and 750 tokens of 2:42 minutes"
    page.get_by_text("750 tokens instead of 4072").wait_for()
    listened = len(encoded)

    # By keys alone: ask, go to the time in the answer, play.
    page.locator("#question textarea").fill(QUESTION)
    page.locator("#question textarea").press("Enter")
    time = page.locator("#answer button[data-seconds]")
    time.wait_for()
    assert page.locator("#answer").inner_text().startswith("on tuesday at ten [")
    time.press("Enter")
    seconds = float(time.get_attribute("data-seconds"))
    player = page.locator("#answer audio")
    page.wait_for_function("!document.querySelector('#answer audio').paused", timeout=WAIT)
    assert player.evaluate("player => player.currentTime") == pytest.approx(seconds, abs=10)

    # Another L is drawn, and the encoder is not asked.
    number = page.locator("#length input[type=number]")
    number.fill("100")
    number.press("Enter")
    page.locator('.picture svg[aria-label*=" 100 tokens"]').wait_for()
    page.get_by_text("100 tokens instead of 4072").wait_for()
    page.screenshot(path=shots / "page.png", full_page=True)
    assert len(encoded) == listened > 0
    hook.remove()


@needs_chromium
def test_a_wrong_file_is_refused_by_a_sentence(address, browser, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio at all" * 100)
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.get_by_role("button", name="Example: a sonnet").click()
    page.locator(".picture svg[role=img]").wait_for()
    page.get_by_label("Clear").first.click()
    upload(page, broken)
    page.get_by_text(re.compile(r"broken\.wav .*")).first.wait_for()
    assert page.locator(".picture svg[role=img]").count() == 0  # nothing is left of the sonnet
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("There is no recording yet").wait_for()
    page.close()


@needs_chromium
def test_an_answer_that_is_cut_is_said_to_be(address, browser, session, monkeypatch):
    monkeypatch.setattr(session, "max_new_tokens", 1)
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.get_by_role("button", name="Example: a sonnet").click()
    page.locator(".picture svg[role=img]").wait_for()
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("The answer may go on: it reached 1 tokens.").wait_for()
    page.close()


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(theme, address, browser, shots):
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, device_scale_factor=2)
    page.set_default_timeout(WAIT)
    page.goto(f"{address}?__theme={theme}")
    page.get_by_role("button", name="Example: a sonnet").click()
    page.locator(".picture svg[role=img]").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert ("dark" in (page.locator("body").get_attribute("class") or "")) is (theme == "dark")
    ink = page.locator(".picture svg[role=img]").evaluate("svg => getComputedStyle(svg).color")
    brightness = sum(map(int, re.findall(r"\d+", ink)[:3])) / 3
    assert (brightness > 128) is (theme == "dark")
    page.screenshot(path=shots / f"page-phone-{theme}.png", full_page=True)
    page.close()


def test_a_space_has_what_it_needs():
    front = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    fields = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert fields["sdk"] == "gradio" and (SPACE / fields["app_file"]).exists()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|page) = \[(.*?)\]", project, flags=re.MULTILINE | re.DOTALL)
    needed = [name for of_one in lists for name in re.findall(r'"([^"]+)"', of_one)]
    assert (SPACE / "requirements.txt").read_text(encoding="utf-8").split() == needed and len(needed) > 10
    described = (SPACE / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(path.name in described for path in (SPACE / "examples").glob("*.ogg"))
