"""`python -m dev.site [FOLDER]`: the site, built strictly into FOLDER (site/ by default)."""

import sys
from pathlib import Path

from dev.site.build import ROOT, build

build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
