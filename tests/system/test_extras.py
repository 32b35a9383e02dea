"""Optional libraries: what a missing one raises, and the command that installs it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from retnet.system import extras
from retnet.system.extras import LIBRARIES, MissingExtra, install_command, needs, require
from tests.paths import ROOT

DISTRIBUTIONS = {"lm_eval": "lm-eval", "prometheus_client": "prometheus-client", "starlette": "fastapi"}


@pytest.fixture
def blocked(monkeypatch):
    for library in ("matplotlib", "accelerate", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)


def test_a_missing_library_is_named_with_its_extra(blocked):
    with pytest.raises(MissingExtra, match=r"--png needs matplotlib, which is not installed; accepted: .*\[plots\]'$"):
        require("plots", "--png")
    with pytest.raises(MissingExtra, match=r"Training needs transformers and accelerate, which are not installed; "):
        require("train", "Training", "transformers", "accelerate")
    picture = pytest.raises(ImportError, match=r"A picture needs matplotlib, .*\[plots\]'$")
    with picture as caught, needs("plots", "A picture"):
        import matplotlib.figure  # noqa: F401
    assert caught.value.name == "matplotlib"


def test_what_is_installed_passes_and_is_not_imported(monkeypatch):
    monkeypatch.setitem(LIBRARIES, "words", ("colorsys", "json"))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    require("words", "A test")
    require("plots", "A test", "json")
    assert "colorsys" not in sys.modules


def test_an_error_inside_a_library_is_not_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "not_there", None)
    with pytest.raises(ModuleNotFoundError, match="not_there") as caught, needs("plots", "A picture"):
        import not_there  # noqa: F401
    assert not isinstance(caught.value, MissingExtra)


def test_the_command_is_for_this_environment_and_this_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(extras.shutil, "which", lambda name: str(Path(sys.executable).with_name(name)))
    monkeypatch.setattr(extras, "__file__", str(ROOT / "retnet" / "system" / "extras.py"))
    monkeypatch.chdir(ROOT)
    assert install_command("plots") == "pip install -e '.[plots]'"
    monkeypatch.chdir(tmp_path)
    assert install_command("plots") == f"pip install -e '{ROOT}[plots]'"
    monkeypatch.setattr(extras.shutil, "which", lambda name: "/usr/bin/pip")
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "retnet" / "system" / "extras.py"))
    assert install_command("plots") == f"{sys.executable} -m pip install 'retnet[plots]'"


def test_every_extra_installs_the_libraries_that_its_code_imports():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def installs(extra: str) -> str:
        lines = table[extra]
        inner = [name for line in lines if line.startswith("retnet[") for name in line[7 : line.index("]")].split(",")]
        return "\n".join([*lines, *map(installs, inner)])

    for extra, libraries in LIBRARIES.items():
        for library in libraries:
            assert f"\n{DISTRIBUTIONS.get(library, library)}>=" in f"\n{installs(extra)}", (extra, library)
    everything = {line for line in installs("all").splitlines() if not line.startswith("retnet[")}
    for extra in LIBRARIES.keys() - {"triton"}:
        assert {line for line in installs(extra).splitlines() if not line.startswith("retnet[")} <= everything
