"""`python -m dev.site [FOLDER]`: the site, built strictly into FOLDER (site/ by default)."""

import subprocess
import sys
from pathlib import Path

from dev.site.staging import ROOT

try:
    from dev.site.build import build

    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
except ImportError as error:
    sys.exit(f"{error}; the site needs the extra `docs`: pip install '.[docs]'")
except (ValueError, subprocess.CalledProcessError) as error:
    sys.exit(f"no site: {error}")
