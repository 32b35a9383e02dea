"""The pictures of the documentation: their size, their letters, and whether they are those that the code draws."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version

import pytest

from retnet.plots.frame import SMALL, save
from tests.paths import ROOT
from tests.plots.boxes import faults, smallest_letters

PICTURES = ROOT / "docs" / "pictures"
WIDEST, HEAVIEST = 1660, 300 * 1024  # pixels: twice the width of a page; bytes
ROWS = ROOT / "benchmarks" / "results"
# picture -> the words that draw it from saved rows, without the path where it goes
DRAWN_BY = {
    "tri_mixer.svg": ["-m", "retnet.cli", "stack", "explain", "arch_expert_research", "--picture"],
    "generate.png": ["benchmarks/bench_generate.py", "--model", "retnet-1.3b", "--dtype", "bfloat16",
                     "--csv", str(ROWS / "generate_retnet-1.3b_h200.csv"), "--plot"],
    "figure6.png": ["benchmarks/bench_figure6.py", "--csv", str(ROWS / "figure6_retnet-6.7b.csv"), "--plot"],
    "retention.png": ["benchmarks/bench_retention.py", "--csv", str(ROWS / "retention_h200.csv"), "--plot"],
    "mixers.png": ["recipes/mixers_pictures.py", "recipes/results/mixers/mixers.csv", "--png"],
    "recall.png": ["recipes/mqar.py", "plot", "--from", "recipes/results/mqar_conv", "--out"],
    "quality.png": ["recipes/quality.py", "plot", "recipes/results/quality_125m.jsonl", "--stacks", "llama",
                    "gated-conv+sigmoid", "hybrid+sigmoid", "retnet-conv+sigmoid", "--png"],
    "mup.png": ["recipes/mup.py", "plot", "--from", "recipes/results/mup", "--png"],
    "wikipedia.png": ["recipes/curves.py", "--rates", "recipes/results/wikipedia_125m.csv", "--png"],
}  # fmt: skip


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPTS = {
    "decay_masks.png": ("decay_pictures", "draw_masks"),
    "windows.png": ("decay_pictures", "draw_windows"),
    "three_forms.svg": ("three_forms", "draw"),
}


def draw(name: str):
    file, function = SCRIPTS[name]
    return getattr(script(file), function)()


drawn = cache(draw)  # for tests that look at it; laid out twice, it would not be the stored one


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.png")), ids=lambda path: path.name)
def test_a_picture_is_at_most_twice_as_wide_as_a_page_and_light(path):
    data = path.read_bytes()
    width = int.from_bytes(data[16:20])
    assert len(data) <= HEAVIEST
    assert width <= WIDEST


def test_every_picture_is_shown_on_a_page_and_its_rows_are_listed():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"pictures/([\w.]+)\)", page.read_text())}
    files = {path.name for path in PICTURES.iterdir()}
    assert shown == files
    listed = (ROWS / "README.md").read_text()
    assert [name for name in files if name not in listed and not name.startswith("page_")] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_text_covers_another_and_the_letters_can_be_read(name):
    figure = drawn(name)
    assert faults(figure) == []
    assert smallest_letters(figure) >= SMALL


def test_each_row_of_masks_has_its_own_gammas():
    titles = [axes.get_title() for axes in drawn("decay_masks.png").axes]
    assert titles[:2] == titles[4:6] == ["head 0, γ = 0.9688", "head 1, γ = 0.9844"]
    assert all(re.fullmatch(r"head \d, mean γ = 0\.\d{4}", title) for title in titles[8:12])
    assert len(set(titles[8:12])) == 4


@pytest.mark.slow
@pytest.mark.skipif(
    f"matplotlib=={version('matplotlib')}" not in (ROOT / "constraints.txt").read_text(), reason="another matplotlib"
)
@pytest.mark.parametrize("name", [*SCRIPTS, *DRAWN_BY])
def test_the_stored_pictures_are_those_that_the_code_draws(name, tmp_path):
    path = tmp_path / name
    if name in SCRIPTS:
        save(draw(name), path)
    else:
        out = tmp_path if name == "recall.png" else path
        command = [sys.executable, *DRAWN_BY[name], str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        path = tmp_path / "mqar.png" if name == "recall.png" else path
    assert path.read_bytes() == (PICTURES / name).read_bytes()


def test_every_picture_that_is_drawn_from_rows_names_its_rows():
    listed = (ROWS / "README.md").read_text()
    assert "not saved |" not in listed
    named = re.findall(r"`((?:recipes/results/)?[\w./-]+\.(?:csv|jsonl))`", listed)
    files = [ROOT / name if "/" in name else ROWS / name for name in named]
    assert len(files) >= len(DRAWN_BY) - 1
    assert [file for file in files if not file.is_file()] == []
