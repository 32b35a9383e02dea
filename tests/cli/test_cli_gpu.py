"""`retnet doctor` and the HTML report of `retnet train` on a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from tests.cli.command import run
from tests.paths import ROOT

pytestmark = pytest.mark.gpu


def test_doctor_names_the_gpu_and_its_kernels_agree():
    words = [sys.executable, "-m", "retnet.cli", "doctor", "--json", "--seconds", "100"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    told = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert [finding for finding in told["findings"] if finding["status"] == "problem"] == []
    assert done.returncode == 0
    assert "built for CUDA" in found["PyTorch"]["text"]
    assert found["GPU 0"]["text"].startswith(torch.cuda.get_device_name(0))
    assert found["kernels"]["status"] == "ok"
    assert "the gradients agree" in found["kernels"]["text"]
    assert torch.cuda.get_device_name(0) in found["tuning"]["text"]
    for name in ("forms agree", "training step", "save and load"):
        assert found[name]["status"] == "ok"


def test_the_report_of_a_run_names_the_gpu_its_memory_and_its_rate(tmp_path, byte_model, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(f"document {number}: the state decays, and the state is read. " * 40)
    settings = {"length": 64, "max_steps": 8, "logging_steps": 2, "bf16": True, "num_samples": 1, "report_to": "none"}
    words = [f"{name}={value}" for name, value in settings.items()]
    assert run("train", f"model={byte_model}", f"data={text}", f"output_dir={tmp_path / 'out'}", *words) == 0
    gpu = torch.cuda.get_device_name(0)
    assert "MFU is relative to" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert gpu in page
    assert re.search(r"<b>[\d,]+</b><span>tokens/s, MFU \d+\.\d%", page)
    assert re.search(r"<b>[\d.]+ [KMG]iB</b><span>peak memory", page)
    assert len(re.findall("<svg", page)) >= 3
    assert re.search(r"(src|href)=.https?:", page) is None
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert 0 < max(entry.get("mfu", 0) for entry in training["log"]) < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert gpu in card
