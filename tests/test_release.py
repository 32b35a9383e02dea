"""The facts that a release states: one version everywhere, and the interpreters that the package is for."""

from __future__ import annotations

import re
import tomllib

import yaml

import retnet
from tests.paths import ROOT


def test_the_version_is_the_same_in_the_package_the_citation_and_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = next(heading for heading in headings if heading != "Unreleased")
    assert citation["version"] == newest == retnet.__version__


def test_the_classifiers_name_the_oldest_python_that_is_accepted_and_no_older_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert f">={named[0]}" == project["requires-python"]
    assert named == sorted(named, key=lambda version: int(version.split(".")[1]))


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2307.08621"
    assert "2307.08621" in str(retnet.__doc__)
