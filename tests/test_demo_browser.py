"""The demo in a real browser, at desktop and phone width; skips where no browser is installed."""

from __future__ import annotations

import shutil
import threading
from types import SimpleNamespace

import pytest
from tiny import tiny_image, tiny_model, tiny_processor

pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[all,dev]'")
pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[all,dev]'")

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mllm.demo.answers import Backend
from mllm.demo.app import Demo
from mllm.demo.limits import Limits

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ),
)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser or driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def demo():
    demo = Demo(Backend(tiny_model("llava", fresh=True), tiny_processor("llava"), "tiny", Limits(pages=3)))
    demo.address = demo.launch()
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def address(demo):
    return demo.address


class Page:
    """The demo in one browser window."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.wait = WebDriverWait(driver, 90, ignored_exceptions=[StaleElementReferenceException])

    def find(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, selector: str, count: int = 1):
        """The first of at least ``count`` visible elements."""

        def shown(_):
            found = [element for element in self.find(selector) if element.is_displayed()]
            return found if len(found) >= count else None

        return self.wait.until(shown, f"no {count} {selector}")[0]

    def click(self, selector: str) -> None:
        element = self.until(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self.wait.until(lambda _: element.is_enabled())
        element.click()

    def until_text(self, selector: str, text: str) -> None:
        self.wait.until(lambda _: any(text in e.text for e in self.find(selector)), f"no {text!r} in {selector}")

    def set_number(self, selector: str, value: int) -> None:
        """Type a number beside a slider."""
        number = self.until(f"{selector} input[type=number]")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", number)
        number.clear()
        number.send_keys(f"{value}\t")

    def ask(self, text: str, file) -> None:
        if file is not None:
            self.find("#box input[type=file]")[0].send_keys(str(file))
            self.until("#box .thumbnails > *, #box .thumbnail-item, #box .file-icon, #box .thumbnail-image")
        self.until("#box textarea").send_keys(text)
        self.click("#box button.submit-button")


@pytest.fixture(params=list(WIDTHS))
def page(request, address, tmp_path):
    width, height = WIDTHS[request.param]
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    driver.get(address)
    yield Page(driver)
    driver.quit()


def test_a_visit(page, tmp_path):
    tiny_image(0, (64, 48)).save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "picture.png").read_bytes()[:80])

    # the first screen: both columns, the box, examples, techniques with their state
    page.until("#full")
    page.until("#other")
    page.until("#examples button", 5)
    page.until_text("#status", "Ready")

    # a question about an upload: two answers, what they cost, what was saved, and a chart
    page.ask("what is it?", tmp_path / "picture.png")
    page.until("#full .mllm-costs")
    page.until("#other .mllm-costs")
    page.until_text("#saving", "less arithmetic in the decoder")
    chart = page.until("#chart svg")
    assert "exit after layer 4" in chart.text
    assert chart.get_attribute("aria-label").startswith("Visual tokens alive in each layer: ")
    page.until("#tokens img")
    assert len(page.find("#full img")) == 1
    page.until_text("#layer-text", "no visual tokens")
    page.until("#layer input[type=range]").send_keys(Keys.HOME)
    page.until_text("#layer-text", "Layer 0: ")

    # a technique more, and one that conflicts: the reason is shown, and taken back
    page.click("#on-NAAViT input")
    page.until("#arguments-NAAViT")
    page.click("#on-FreezeVisual input")
    page.until_text("#status", "both decide what visual rows do")
    page.click("#on-FreezeVisual input")
    page.until_text("#status", "Ready")
    page.click("#retry")
    page.until_text("#saving", "NAAViT")
    page.until("#chart .passive")
    assert len(page.find("#full .mllm-costs")) == 1

    # the settings are scored on a task: a bar, then the point in the plot
    page.click("#evaluation button")
    page.set_number("#samples", 2)
    page.click("#evaluate")
    page.until_text("#evaluate-notice", "2 samples")
    assert page.until("#plot svg").get_attribute("aria-label").count("% of the FLOPs") == 2

    # a broken file: the message, and the answers are still there
    page.ask("what is this?", tmp_path / "broken.png")
    page.until_text("#notice [role=alert]", "broken.png is damaged or cut short")
    assert len(page.find("#full .mllm-costs")) == 1

    # nothing is cut off at the side, and nothing failed in the page
    wide, window = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    errors = [entry["message"] for entry in page.driver.get_log("browser") if "favicon" not in entry["message"]]
    assert errors == []

    page.click("#clear")
    page.wait.until(lambda _: not page.find("#full .mllm-costs"))


def test_dark_mode_is_readable(page, address):
    """Text and background of messages, charts and controls differ enough to be read (WCAG's 4.5 to 1)."""
    page.driver.get(f"{address}?__theme=dark")
    page.click("#examples button")
    page.click("#box button.submit-button")
    page.until("#chart svg")
    colours = page.driver.execute_script(
        """
        const paint = c => { const x = document.createElement('canvas').getContext('2d'); x.fillStyle = c;
          x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data]; };
        const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if (paint(c)[3] > 200) return paint(c); } return [255, 255, 255, 255]; };
        return ['#saving .mllm-notice', '#status .mllm-notice', '#full .mllm-costs', '#head p', '#layer-text p',
                '#on-DyVTE span', '#chart figcaption, #tokens figcaption'].map(s => {
          const e = document.querySelector(s); return [s, paint(getComputedStyle(e).color), behind(e)]; });
        """
    )
    for selector, front, back in colours:
        assert contrast(front, back) >= 4.5, (selector, front, back)


@pytest.fixture
def held(demo):
    """Answers that begin and write nothing until they are told to stop, however fast the machine is; set: as usual."""
    real, held = demo.backend.model.generate, SimpleNamespace(begun=threading.Semaphore(0), free=threading.Event())

    def generate(*arguments, stopping_criteria=(), **options):
        if not held.free.is_set():
            held.begun.release()
            assert stopping_criteria[0].stop.wait(120), "nobody told the answer to stop"
        return real(*arguments, stopping_criteria=stopping_criteria, **options)

    demo.backend.model.generate = generate
    yield held
    del demo.backend.model.generate


def test_two_tabs_one_is_stopped_the_other_closed_while_it_is_answered(page, demo, held):
    """Each tab has its own chat and settings; a tab that goes away lets the other one go on."""
    driver = page.driver
    page.until_text("#status", "Ready")
    first = driver.current_window_handle
    page.ask("tell me more", None)
    assert held.begun.acquire(timeout=120)
    page.click("#stop")
    page.until_text("#full", "(stopped)")
    page.wait.until(lambda _: page.find("#retry")[0].is_enabled())
    assert len(demo.sessions) == 1

    driver.switch_to.new_window("tab")
    driver.get(demo.address)
    page.until_text("#status", "Ready")
    assert page.find("#full [data-testid=user]") == []
    page.click("#on-NAAViT input")
    page.ask("and this?", None)
    assert held.begun.acquire(timeout=120)
    driver.close()  # while it is answered
    driver.switch_to.window(first)
    page.wait.until(lambda _: len(demo.sessions) == 1, "the closed tab is still remembered")
    held.free.set()
    assert not page.find("#on-NAAViT input")[0].is_selected()
    page.ask("and now?", None)
    page.until("#other .mllm-costs")


def test_too_much_is_told(page, tmp_path):
    """Thirty files, no text and far too much text: a message, and the page goes on."""
    page.until_text("#status", "Ready")
    files = [tmp_path / f"{number}.png" for number in range(30)]
    for number, file in enumerate(files):
        tiny_image(number, (32, 32)).save(file)
    page.ask("what are they?", "\n".join(map(str, files)))
    page.until_text("#notice [role=alert]", "30 files; at most 16 are read")
    wide, window = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window  # thumbnails go on in the next row
    page.driver.refresh()
    page.until_text("#status", "Ready")
    page.ask(" ", None)
    page.until_text("#notice [role=alert]", "Write a question first")
    page.driver.execute_script(
        """const box = document.querySelector('#box textarea'); box.value = 'why? '.repeat(4000);
        box.dispatchEvent(new Event('input', {bubbles: true}));"""
    )
    page.click("#box button.submit-button")
    page.until_text("#notice [role=alert]", "The question has 19,999 characters; at most 2,000 are read")


def contrast(front: list[int], back: list[int]) -> float:
    """Contrast of two colours, as WCAG defines it."""

    def light(colour: list[int]) -> float:
        parts = [c / 255 for c in colour[:3]]
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(front), light(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)
