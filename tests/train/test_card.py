"""The model card of a run, and the upload of the run's directory to a hub that a thread of the test serves."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from retnet.models.directory import load_config, load_model
from retnet.train.card import MARK, write_card
from retnet.train.finish import TrainingSummary
from retnet.train.run import train
from tests.paths import ROOT
from tests.small_models import BYTES, small_config

from .conftest import recipe_for

SUMMARY = TrainingSummary(8, 4096, 2.0, 9, 1, 1.5, 4.4817, 2.164, 1000, 0.0, "x")
TABLES = {
    "Data": [("/home/eve/secret/wiki.txt", "9 MB | x"), ("validation: /home/eve/secret/wiki.txt", "1 MB")],
    "Settings": [("learning_rate", "0.001"), ("output_dir", "/home/eve/secret"), ("valid", "/home/eve/secret/b.txt")],
    "Machine": [("processor", "A <b>CPU</b>")],
    "Software": [("commit", "unknown: not run from a checkout"), ("torch", "2")],
}


def test_a_card_has_the_facts_of_the_run_and_no_other(tmp_path):
    config = small_config(**BYTES)
    write_card(tmp_path, config, SUMMARY, TABLES, None)
    text = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["retnet", "linear-attention"]
    }  # fmt: skip
    for line in (
        "| steps | 8 |", "| tokens | 4,096 |", "| time | 2 s, 2,048 tokens/s |", "| validation loss | 1.5000 nats per",
        "| wiki.txt | 9 MB \\| x |", "| validation: wiki.txt | 1 MB |", "| processor | A &lt;b>CPU&lt;/b> |",
        "| torch | 2 |", "| valid | b.txt |", f'from_pretrained("{tmp_path.name}")',
    ):  # fmt: skip
        assert line in text, line
    for absent in ("secret", "commit", "license", "loss_curve", "None"):
        assert absent not in text, absent
    (tmp_path / "loss_curve.png").touch()
    unmeasured = TrainingSummary(8, 4096, 2.0, 9, 0, None, None, None, 1000, 0.0, "x")
    write_card(tmp_path, config, unmeasured, {}, "eve/model")
    text = (tmp_path / "README.md").read_text()
    assert "(loss_curve.png)" in text
    assert 'from_pretrained("eve/model")' in text
    assert "validation" not in text


def test_a_card_that_a_user_has_edited_is_kept(tmp_path):
    config = small_config(**BYTES)
    write_card(tmp_path, config, SUMMARY, TABLES, None)
    edited = (tmp_path / "README.md").read_text().replace(MARK, "") + "mine"
    (tmp_path / "README.md").write_text(edited)
    write_card(tmp_path, config, SUMMARY, TABLES, None)
    assert (tmp_path / "README.md").read_text() == edited


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as an upload and a download need: one repository, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, data: object, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": "0" * 40, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, address = self.path, self.server.address
        if path == "/api/repos/create":
            self.answer({"url": f"{address}/eve/model", "name": "eve/model", "id": "eve/model"})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.commits.append(line["value"]["summary"])
                elif line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/eve/model/commit/0"})
        else:  # the check of a card's metadata
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        _, _, name = self.path.partition("/resolve/")[2].partition("/")  # after the revision
        if "/tree/" in self.path:
            self.answer([])
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": file} for file in self.server.files]
            self.answer({"id": "eve/model", "sha": "0" * 40, "siblings": siblings, "private": False, "tags": []})
        elif name in self.server.files:
            self.answer(self.server.files[name], ETag=f'"{name}"')
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.mark.slow
def test_a_run_is_pushed_whole_and_opens_from_the_hub(byte_model, text_folder, tmp_path):
    """In a process of its own, as the hub's address is read at import."""
    hub = Hub()
    words = [f"model={byte_model}", f"data={text_folder}", f"output_dir={tmp_path / 'out'}", "length=48",
             "max_steps=4", "per_device_train_batch_size=4", "save_strategy=no", "push_to_hub=true",
             "hub_model_id=eve/model", "hub_token=hf_none", "hub_strategy=end"]  # fmt: skip
    environment = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "retnet.cli", "train", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout[-1000:]
    out = tmp_path / "out"
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json", "retnet_shim.py", "training.json"):
        assert hub.files[name] == (out / name).read_bytes(), name
    assert "training_args.bin" not in hub.files
    assert not any(name.startswith("checkpoint") for name in hub.files)
    assert 'from_pretrained("eve/model")' in hub.files["README.md"].decode()
    assert b"hf_none" not in b"".join(hub.files.values()), "no token is published"
    code = (
        "import retnet.hf\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (c.from_pretrained('eve/model') for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "print(model(**tokenizer('decay', return_tensors='pt')).logits.sum().item())"
    )
    opened = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert opened.returncode == 0, opened.stderr[-2000:]
    import torch

    expected = load_model(out)(torch.tensor([[256, *b"decay"]])).logits.sum().item()
    assert float(opened.stdout.split()[-1]) == pytest.approx(expected, rel=1e-4)
    hub.shutdown()


@pytest.mark.slow
def test_a_run_writes_its_card(byte_model, text_folder, tmp_path, console):
    train(recipe_for(byte_model, text_folder, tmp_path / "out", max_steps=3, do_eval=True), console)
    text = (tmp_path / "out/README.md").read_text()
    summary = json.loads((tmp_path / "out/training.json").read_text())["summary"]
    assert f"| validation loss | {summary['valid_loss']:.4f} nats per token |" in text
    assert f"| tokens | {summary['tokens']:,} |" in text
    assert f"{load_config(tmp_path / 'out').vocab_size}" in text
    assert str(Path(text_folder).parent) not in text
    for title in ("### Data", "### Settings", "### Machine", "### Software"):
        assert title in text
