"""The checks of `retnet doctor` on sound and on broken installations."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from retnet.cli.diagnosis import checks, installation
from retnet.cli.diagnosis.checks import devices, forms_agree, kernels, save_and_load, torch_build, train_step
from retnet.cli.diagnosis.finding import Finding


def one(check) -> Finding:
    (finding,) = check()
    return finding


@pytest.mark.parametrize("check", [forms_agree, train_step, save_and_load])
def test_a_sound_installation_passes(check):
    assert one(check).status == "ok"


def test_forms_that_differ_are_a_problem(monkeypatch):
    from retnet.ops import retention as module

    right = module.retention

    def wrong(*inputs, **options):
        out, state = right(*inputs, **options)
        return (out * 1.001 if options.get("mode") == "recurrent" else out), state

    monkeypatch.setattr("retnet.eval.agreement.retention", wrong)
    finding = one(forms_agree)
    assert finding.status == "problem"
    assert "recurrent differs by 1.0e-03" in finding.text


def test_a_step_that_does_not_learn_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert one(train_step).status == "problem"


def test_weights_that_change_on_the_disk_are_a_problem(monkeypatch):
    from retnet.models import directory

    def other(folder):
        model = load(folder)
        torch.nn.init.zeros_(model.head.weight)
        return model

    load = directory.load_model
    monkeypatch.setattr(directory, "load_model", other)
    assert one(save_and_load) == Finding("save and load", "problem", "a saved model gives other logits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_kernels_are_not_run_without_a_gpu():
    assert one(kernels).status == "not run"
    assert list(checks.tuned()) == []


def test_a_gpu_without_triton_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    finding = one(kernels)
    assert finding.status == "problem"
    assert "[triton]" in finding.advice


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(checks, "driver", lambda: None)
    assert one(devices).status == "note"
    monkeypatch.setattr(checks, "driver", lambda: "NVRM version: 570.1")
    assert one(devices).status == "slow"
    assert "built for CPUs" in one(devices).text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert one(devices).status == "problem"  # a driver, a build for it, and no device


def test_threads_that_are_held_back_are_said(monkeypatch):
    monkeypatch.setattr(checks, "usable_cores", lambda: torch.get_num_threads() + 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, threads = torch_build()
    assert (threads.status, threads.advice) == ("slow", "unset OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS=1" in threads.text
    monkeypatch.setattr(checks, "usable_cores", lambda: 1)
    assert [finding.status for finding in torch_build()] == ["ok", "ok"]


def test_a_library_that_is_there_and_cannot_be_imported_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("raise OSError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(checks, "LIBRARIES", {"hf": ("broken_library",)})
    finding = one(checks.CHECKS["imports of hf"])
    assert (finding.status, finding.text) == ("problem", "OSError: undefined symbol: x")
    monkeypatch.setattr(checks, "LIBRARIES", {"hf": ("no_such_library",)})
    assert list(checks.CHECKS["imports of hf"]()) == []


def test_the_installation_is_described_without_imports(monkeypatch):
    findings = {finding.name: finding for finding in installation.installation()}
    assert {"retnet", "Python", "processor", "memory", "core packages", "extra hf"} <= set(findings)
    assert findings["retnet"].status == "ok"


def test_missing_extras_have_the_words_that_install_them(monkeypatch):
    monkeypatch.setattr(installation, "LIBRARIES", {"hf": ("json", "no_such_library")})
    (finding,) = installation._extras()
    assert (finding.status, finding.text) == ("note", "not installed: no_such_library")
    assert "[hf]" in finding.advice


def test_settings_that_slow_everything_down_are_said(monkeypatch):
    for name in installation.SLOW_SETTINGS:
        monkeypatch.setenv(name, "0")
    assert list(installation._settings()) == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (finding,) = installation._settings()
    assert (finding.status, finding.advice) == ("slow", "unset TRITON_INTERPRET")


def test_packages_that_do_not_fit_are_a_problem(monkeypatch):
    wanted = ["torch>=999", "no-such-package>=1", 'other>=1; extra == "train"', "typer>=0.1"]
    monkeypatch.setattr(installation.importlib.metadata, "requires", lambda name: wanted)
    finding = installation._requirements()
    assert finding.status == "problem"
    assert finding.text == f"torch is {version('torch')}, needed: >=999; no-such-package is missing"


def test_a_quota_below_the_cores_is_said(monkeypatch):
    monkeypatch.setattr(installation, "usable_cores", lambda: 8)
    monkeypatch.setattr(installation, "core_quota", lambda: 2.0)
    finding = installation._processor()
    assert finding.status == "slow"
    assert finding.advice.endswith("OMP_NUM_THREADS=2")


def test_a_machine_that_is_busy_is_said(monkeypatch):
    cores = installation.os.cpu_count() or 1
    monkeypatch.setattr(installation.os, "getloadavg", lambda: (cores * 1.4, 0.0, 0.0))
    assert list(installation._load()) == []
    monkeypatch.setattr(installation.os, "getloadavg", lambda: (cores * 3.0, 0.0, 0.0))
    (finding,) = installation._load()
    assert finding.status == "slow"
    assert f"{cores * 3.0:.1f} processes want to run on {cores} cores" in finding.text
