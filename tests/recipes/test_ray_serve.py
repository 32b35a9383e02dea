"""Two replicas on Ray Serve: affinity by header, and sessions that outlive the replica that kept them."""

from __future__ import annotations

import json
import os
import socket
import sys
import urllib.request

import pytest

from tests.paths import ROOT

ray = pytest.importorskip("ray", reason="ray is not installed")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow

FOLDER = ROOT / "recipes" / "serve"
BODY = {"model": "retnet-tiny", "temperature": 0}


class Client:
    """JSON over HTTP to Ray's proxy."""

    def __init__(self, port: int):
        self.base = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict, **headers: str) -> dict:
        headers = {"content-type": "application/json"} | {name.replace("_", "-"): x for name, x in headers.items()}
        request = urllib.request.Request(self.base + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def complete(self, prompt: str, tokens: int = 8, *, affinity: str | None = None, **fields: object) -> dict:
        headers = {} if affinity is None else {"x_session_id": affinity}
        return self.post("/v1/completions", BODY | {"prompt": prompt, "max_tokens": tokens, **fields}, **headers)


@pytest.fixture(scope="module")
def cluster():
    """A Ray instance whose workers import this tree, and the port of its HTTP proxy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.path.insert(0, str(FOLDER))
    paths = os.pathsep.join([str(ROOT), str(FOLDER)])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables}, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.path.remove(str(FOLDER))


@pytest.fixture
def deploy(cluster):
    from ray_serve import Options, build

    def start(**options) -> Client:
        serve.run(build(Options(model="retnet-tiny", device="cpu", replicas=2, cpus=1, **options)), name="retnet")
        return Client(cluster)

    yield start
    serve.delete("retnet")


def test_requests_with_one_session_header_reach_one_replica(deploy):
    """Without a shared folder, a session is in the memory of the replica that kept it, and nowhere else."""
    client = deploy()
    sessions = {}
    for name in ("a", "b", "c", "d"):
        sessions[name] = client.complete("def main(", keep_session=True, affinity=name)["session"]["id"]
    for name, session in sessions.items():
        for _ in range(3):
            found = client.complete(" x", session_id=session, affinity=name)["session"]
            assert found["reused_tokens"] == found["tokens"] - 1


def test_any_replica_resumes_a_session_and_it_outlives_its_replica(deploy, tmp_path):
    client = deploy(state_dir=tmp_path)
    session = client.complete("import ", 30, keep_session=True)["session"]
    answers = [client.complete("os\n", session_id=session["id"]) for _ in range(6)]  # by either replica
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1
    assert {answer["session"]["reused_tokens"] for answer in answers} == {session["tokens"] - 1}

    with_namespace = [entry for entry in ray.util.list_named_actors(all_namespaces=True) if "REPLICA" in entry["name"]]
    assert len(with_namespace) == 2
    for entry in with_namespace:
        ray.kill(ray.get_actor(entry["name"], entry["namespace"]), no_restart=True)
    client = deploy(state_dir=tmp_path)  # waits until the replicas that Ray starts in their place are ready
    again = client.complete("os\n", session_id=session["id"])
    assert {again["choices"][0]["text"]} == texts
    assert again["session"]["reused_tokens"] == session["tokens"] - 1
