"""The folder of the recipes on the import path, as it is when a recipe runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
