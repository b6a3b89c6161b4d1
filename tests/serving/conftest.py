"""A server, its client, and a browser for its page."""

import functools
import ssl
from collections.abc import Iterator

import openai
import pytest

from tests.serving.browser import Page, is_there, started
from tests.serving.servers import running
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(scope="session", autouse=True)
def _certificates_read_once() -> Iterator[None]:
    """httpx reads them for each call, which takes longer than most answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="module")
def pipelines():
    return {"classes": tiny_pipeline(), "texts": tiny_text_pipeline()}


@pytest.fixture(scope="module")
def server(pipelines):
    with running(pipelines) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


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
