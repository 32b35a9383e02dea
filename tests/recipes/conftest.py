"""The folder of the recipes on the import path, as it is when a recipe runs."""

import sys

from tests.paths import ROOT

sys.path.insert(0, str(ROOT / "recipes"))
