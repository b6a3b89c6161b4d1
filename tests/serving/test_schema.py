"""No request, of the API's description or just beside it, is answered with a 500."""

import pytest
from hypothesis import HealthCheck, given, settings

from llamagen.serving.settings import ServerSettings
from tests.serving.servers import running
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def schema():
    pipelines = {"classes": tiny_pipeline(), "texts": tiny_text_pipeline()}
    with running(pipelines, settings=ServerSettings(max_images=2)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_fault(schema, mode):
    asked = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))

        @given(case=strategy)
        @settings(
            max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        def check(case):
            answer = case.call()
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text
            asked.add((case.operation.path, answer.status_code))

        # Nothing can be wrong with a request that has no body: any name in a path is one.
        if mode == "positive" or operation.body:
            check()
    for name in ("generations", "edits", "variations"):
        assert (f"/v1/images/{name}", 400) in asked
    if mode == "positive":
        assert {("/v1/models", 200), ("/v1/files/{name}", 404)} <= asked
