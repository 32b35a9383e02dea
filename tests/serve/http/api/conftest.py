"""A tiny server."""

import pytest

from tests.serve.http.server import tiny_server


@pytest.fixture(scope="module")
def client():
    with tiny_server() as client:
        yield client
