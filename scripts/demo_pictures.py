"""Take the pictures of the demo in ``docs/demo``: the default model answers examples of the page in a browser.

python scripts/demo_pictures.py            # needs chromium and chromedriver, and `mllm fetch-default`
"""

from __future__ import annotations

import argparse
import base64
import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from mllm.demo.answers import Backend
from mllm.demo.app import Demo
from mllm.loading import load
from mllm.saving import packaged_parts

WIDTH = 1280
#: file -> theme, what the example's button says, YAML of the techniques; None: as the page opens
PICTURES: dict[str, tuple[str, str, str | None]] = {
    "dark": ("dark", "Shapes", None),
    "pages": ("light", "PDF", "techniques: [{technique: URaG, weights: default/urag, keep_pages: 1}]"),
}


def take(driver: webdriver.Chrome, address: str, theme: str, example: str, config: Path | None, file: Path) -> None:
    """Ask an example and save the whole page."""
    wait = WebDriverWait(driver, 120)

    def until(selector: str, text: str = "") -> WebElement:
        def shown(_: object) -> WebElement | None:
            found = driver.find_elements(By.CSS_SELECTOR, selector)
            return next((e for e in found if e.is_displayed() and text in e.text), None)

        return wait.until(shown, f"no {selector} {text!r}")

    def press(element: WebElement) -> None:
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        wait.until(lambda _: element.is_enabled())
        element.click()

    driver.get(f"{address}?__theme={theme}")
    until("#status", "Ready")
    if config is not None:
        driver.find_element(By.CSS_SELECTOR, "input[type=file][accept*=yaml]").send_keys(str(config))
        until("#status", "depends on")
    press(until("#examples button", example))
    wait.until(lambda _: driver.find_element(By.CSS_SELECTOR, "#box textarea").get_attribute("value"))
    press(until("#box button.submit-button"))
    until("#chart svg")
    until("#saving", "With ")
    height = driver.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    file.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "demo")
    out = parser.parse_args().out
    demo = Demo(Backend(*load("default"), "default"), packaged_parts("default"))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={WIDTH},900"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        demo.backend.warm_up()
        address = demo.launch()
        for name, (theme, example, techniques) in PICTURES.items():
            config = None
            if techniques is not None:
                config = demo.folder / f"{name}.yaml"
                config.write_text(techniques, encoding="utf-8")
            take(driver, address, theme, example, config, out / f"{name}.png")
    finally:
        driver.quit()
        demo.close()


if __name__ == "__main__":
    main()
