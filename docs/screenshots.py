"""Takes the pictures of the image server's page that the documentation shows.

    python docs/screenshots.py http://127.0.0.1:8000 "a red fox" "a slice of cake" --seed 7

Needs a server with its page (``llamagen serve --ui``), selenium, and Chromium with its driver.
The last prompt's images are the large ones; those of the others lie below as earlier ones.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

_SIZES = {"desktop": (1280, 900, 1), "phone": (390, 844, 2)}
"""Width and height in CSS pixels, and pixels per CSS pixel."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server")
    parser.add_argument("prompts", nargs="+", help="texts or classes, drawn one after another")
    parser.add_argument("--model", help="one of the server's; by default its first")
    parser.add_argument("--count", type=int, default=8, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of each prompt's first image")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--driver", default="/usr/bin/chromedriver")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        driver = _browser(options.browser, options.driver, profile)
        try:
            driver.get(options.url)
            _draw_all(driver, options)
            for look in ("light", "dark"):
                for name, size in _SIZES.items():
                    _take(driver, options.out / f"server-{name}-{look}.png", size, look)
        finally:
            driver.quit()


def _browser(browser: str, driver: str, profile: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--force-prefers-reduced-motion", "--window-size=1280,900"),
        f"--user-data-dir={profile}",
    )
    for flag in flags:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def _draw_all(driver: webdriver.Chrome, options: argparse.Namespace) -> None:
    wait = WebDriverWait(driver, 600)
    wait.until(lambda _: driver.find_element(By.ID, "draw").is_displayed())
    if options.model:
        driver.find_element(By.CSS_SELECTOR, f'#model option[value="{options.model}"]').click()
    for prompt in options.prompts:
        values = {"class": prompt, "text": prompt, "count": options.count, "seed": options.seed}
        for name, value in values.items():
            field = driver.find_element(By.ID, name)
            if field.is_displayed():
                field.clear()
                field.send_keys(str(value))
        driver.find_element(By.ID, "draw").click()
        wait.until(lambda _: driver.find_element(By.ID, "draw").text == "Draw")
        error = driver.find_element(By.ID, "error").text
        if error:
            raise SystemExit(error)


def _take(driver: webdriver.Chrome, path: Path, size: tuple[int, int, int], look: str) -> None:
    width, height, scale = size
    features = [{"name": "prefers-color-scheme", "value": look}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": scale > 1}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # As a phone begins, and without a ring around what was pressed last.
    driver.execute_script(
        "document.getElementById('settings').open = arguments[0];"
        "document.activeElement.blur(); scrollTo(0, 0)",
        scale == 1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))
    print(path)


if __name__ == "__main__":
    main()
