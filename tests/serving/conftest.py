"""A browser, for the tests of the server's page."""

import pytest

from tests.serving.browser import Page, is_there, started


@pytest.fixture(scope="module")
def chromium():
    if not is_there():
        pytest.skip("needs Chromium and its driver on the path")
    with started() as driver:
        yield driver


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens a server's page in a browser that has kept nothing; checks what all tests want."""
    pages = []

    def visit(url):
        chromium.get("about:blank")
        chromium.get_log("performance")
        chromium.get_log("browser")
        chromium.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": url, "storageTypes": "all"}
        )
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
        )
        page = Page(chromium, url, tmp_path)
        page.open()
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.read_logs()
        assert page.said == []
        assert page.hosts <= {page.url}


@pytest.fixture
def page(server, visit):
    return visit(server.url)
