"""Requests that schemathesis makes up from the server's own OpenAPI schema: no answer is a 500."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="needs the extra `clients`")

pytestmark = pytest.mark.slow
SECONDS = os.environ.get("RETNET_SCHEMATHESIS_SECONDS", "60")


def test_no_request_is_a_server_error(url, tmp_path):
    beside = Path(sys.executable).with_name("schemathesis")
    program = str(beside) if beside.exists() else shutil.which("schemathesis")
    assert program is not None
    words = ["run", f"{url}/openapi.json", "--checks", "not_a_server_error", "--max-time", SECONDS, "--seed", "1"]
    words += ["--request-timeout", "60", "--continue-on-failure", "--generation-database", "none"]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
