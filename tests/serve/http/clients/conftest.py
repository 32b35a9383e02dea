"""One server for all clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve.http.clients.process import serving


@pytest.fixture(scope="session")
def url(byte_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """The URL of a server of the byte model."""
    with serving(byte_model, "--max-tokens", 2048, "--state-dir", tmp_path_factory.mktemp("sessions")) as url:
        yield url
