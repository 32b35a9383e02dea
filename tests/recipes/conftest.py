"""Recipes are scripts in a folder of their own: importable here as they are when run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
