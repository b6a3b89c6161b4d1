"""A real browser without a window, and the server's page as a person meets it."""

import json
import shutil
import tempfile
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
PNG_END = b"IEND\xaeB`\x82"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--force-prefers-reduced-motion", "--window-size=1280,1100"),
)


def is_there():
    return BROWSER is not None and DRIVER is not None


@contextmanager
def started():
    """A driver of a new browser that has kept nothing."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The page as a person meets it."""

    def __init__(self, driver, url, downloads):
        self.driver, self.url, self.downloads = driver, url, downloads
        self.hosts, self.said = set(), []

    def open(self):
        self.driver.get(self.url)
        self.until(lambda: self.shown("form") or self.shown("key-form") or self.text("error"))

    def until(self, condition, seconds=30.0):
        end = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.02)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def one(self, where):
        """The element with this id, or the first that matches a selector."""
        selector = where if any(c in where for c in "#. [") else f"#{where}"
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def shown(self, where):
        return self.one(where).is_displayed()

    def text(self, where):
        return self.one(where).get_attribute("textContent").strip()

    def value(self, where):
        return self.one(where).get_attribute("value")

    def fill(self, **fields):
        for name, value in fields.items():
            field = self.one(name)
            field.clear()
            field.send_keys(str(value))

    def choose(self, model):
        self.one(f"#model option[value='{model}']").click()

    def press(self, where):
        self.one(where).click()

    def busy(self):
        return self.shown("progress")

    def finish(self):
        self.until(lambda: not self.busy())

    def draw(self, **fields):
        """Draws, and waits for the end."""
        self.fill(**fields)
        self.press("draw")
        self.finish()

    def cards(self):
        return self.all("#latest .card.done")

    def seeds(self):
        texts = [card.find_element("css selector", ".seed").text for card in self.cards()]
        return [int(text.removeprefix("seed ")) for text in texts]

    def view(self, selector="#latest .picture"):
        self.press(selector)
        self.until(lambda: self.shown("viewer-title"))

    def download(self, where="#latest .card.done a"):
        """The file that a link saves."""
        link = self.one(where)
        path = self.downloads / link.get_attribute("download")
        path.unlink(missing_ok=True)
        link.click()
        # The name is taken before the file is whole.
        self.until(lambda: path.is_file() and path.read_bytes().endswith(PNG_END))
        return path

    def narrow(self, width=360, height=740):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def overflow(self):
        """By how many pixels the page is wider than the window."""
        return self.run(
            "const root = document.documentElement; return root.scrollWidth - root.clientWidth"
        )

    def read_logs(self):
        self.said += [
            entry["message"]
            for entry in self.driver.get_log("browser")
            # That a request was refused is no fault of the page.
            if "the server responded with a status of 4" not in entry["message"]
        ]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = urlsplit(message["params"]["request"]["url"])
                if url.scheme not in ("data", "blob"):
                    self.hosts.add(f"{url.scheme}://{url.netloc}")
