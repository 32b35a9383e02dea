"""The page's files and the state of the engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile

import pytest

from retnet.models.cost import transformer_cache_bytes
from retnet.serve.http import page
from tests.paths import ROOT
from tests.serve.http.browser import ARGUMENTS, CHROMIUM
from tests.serve.http.server import MODEL_NAME, live_server, tiny_server

ASSETS = sorted(path.name for path in page.FOLDER.iterdir())


@pytest.fixture(scope="module")
def client():
    with tiny_server(prefix_cache_bytes=1_000_000) as client:
        yield client


def test_the_page_is_html_with_a_strict_policy(client):
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ASSETS)
def test_each_file_has_its_type_and_is_not_sent_again_while_it_is_the_same(client, name):
    response = client.get(f"/page/{name}")
    assert response.status_code == 200
    assert response.content == (page.FOLDER / name).read_bytes()
    assert response.headers["content-type"] == page.TYPES["." + name.rpartition(".")[2]]
    etag = response.headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        again = client.get(f"/page/{name}", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == etag
    assert client.get(f"/page/{name}", headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(f"/page/{name}")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", etag)


@pytest.mark.parametrize(
    "name", ["none.js", "..%2fpage.py", "%2e%2e/page.py", "%2e%2e", "%2fetc%2fpasswd", "index.html%00", "INDEX.HTML"]
)
def test_a_request_opens_no_other_file(client, name):
    response = client.get(f"/page/{name}")
    assert response.status_code == 404
    assert "error" in response.json()


def test_the_files_name_only_each_other_and_have_no_inline_code():
    texts = {path.name: path.read_text() for path in page.FOLDER.iterdir()}
    html = texts["index.html"]
    named = re.findall(r'(?:href|src)="([^"#][^"]*)"', html)
    named += ["page/" + name for text in texts.values() for name in re.findall(r'from "\./([^"]+)"', text)]
    assert {"page/style.css", "page/main.js", "page/chat.js"} <= set(named)
    assert [name for name in named if name.removeprefix("page/") not in texts] == []
    unused = set(texts) - {name.removeprefix("page/") for name in named} - {"index.html"}
    assert unused == set()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", html) == []
    for name, text in texts.items():
        hosts = set(re.findall(r"https?://([\w.]+)", text))
        assert hosts <= {"www.w3.org"}, name  # the name of SVG's elements
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


def test_the_engine_tells_its_slots_its_memory_and_its_prefix_cache(client):
    state = client.get("/v1/engine").json()
    engine = client.app.state.service.engine
    assert state["model"]["name"] == MODEL_NAME
    assert state["model"]["parameters"] == sum(p.numel() for p in engine.model.parameters())
    assert state["model"]["constant_state"] is True
    assert state["slots"] == {"total": 4, "running": 0, "waiting": 0}
    assert state["memory"]["state_bytes_per_stream"] == engine.pool.cost.state
    assert state["memory"]["kv_cache_bytes_per_token"] == transformer_cache_bytes(engine.model.config, 1)
    assert state["prefix"]["hits"] == 0


def test_the_engine_counts_tokens_and_reasons_of_misses(client):
    from retnet.serve.request import Request

    before = client.get("/v1/engine").json()
    service = client.app.state.service
    client.portal.call(_generate, service, Request([1, 2, 3, 4], 5))
    after = client.get("/v1/engine").json()
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == 5
    assert after["time_s"] > before["time_s"]
    missed = sum(after["prefix"]["misses"].values()) - sum(before["prefix"]["misses"].values())
    assert missed == 1


async def _generate(service, request):
    async with await service.submit(request) as stream:
        return [token async for piece in stream for token in piece.tokens]


def test_attention_without_a_window_is_not_called_constant_and_an_absent_cache_is_null():
    from tests.small_models import NOPE, PAPER

    with tiny_server(stack=(PAPER, NOPE)) as client:
        state = client.get("/v1/engine").json()
    assert state["model"]["constant_state"] is False
    assert state["model"]["context_limit"] == 512
    assert state["prefix"] is None


def test_the_page_starts_in_chromium():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with live_server() as server, tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless", *ARGUMENTS, f"--user-data-dir={profile}", "--virtual-time-budget=3000"]
        done = subprocess.run(
            [*command, "--dump-dom", server.url],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"HOME": profile},
        )
    assert f"<title>{MODEL_NAME} · RetNet</title>" in done.stdout, done.stderr[-2000:]
    assert "per stream at every length" in done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_page(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build backend cannot be fetched here")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.rpartition("/")[2] for name in archive.namelist() if "/serve/http/page/" in name}
    assert packed == set(ASSETS)
