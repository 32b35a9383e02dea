"""A browser and a server, for the tests of the page."""

import pytest

from tests.serve.http.browser import chromium
from tests.serve.http.server import live_server


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server():
    with live_server(max_tokens=None, prefix_cache_bytes=1_000_000) as running:
        yield running
