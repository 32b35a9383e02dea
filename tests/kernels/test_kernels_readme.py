"""The kernels' README names only what exists."""

import re
from pathlib import Path

import retnet

KERNELS = Path(retnet.__file__).parent / "kernels"


def test_every_name_in_the_kernels_readme_exists():
    names = set(re.findall(r"`([^`\s]+?)(?:\([^`]*\))?`", (KERNELS / "README.md").read_text()))
    files = {name for name in names if name.endswith(".py")}
    source = "\n".join(path.read_text() for path in KERNELS.rglob("*.py"))
    assert len(names) > 20
    assert {name for name in files if not (KERNELS / name).is_file()} == set()
    assert {name for name in names - files if not re.search(rf"\b{re.escape(name)}\b", source)} == set()
