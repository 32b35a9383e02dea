"""The layout of the tests: it mirrors the package, as tests/README.md says."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "retnet"
README = (TESTS / "README.md").read_text()
ELSEWHERE = [TESTS / name for name in re.findall(r"^\| `([\w/.]+)` \|", README, re.MULTILINE)]


def subjects(folder: Path) -> set[str]:
    """The names that tests of a folder may have: those of its modules, its packages, the folder itself."""
    inside = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    return inside | {folder.name}


def test_every_test_file_is_named_after_what_it_tests():
    strays = []
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.parent == TESTS or any(place in (path, *path.parents) for place in ELSEWHERE):
            continue
        folder, words = PACKAGE / path.parent.relative_to(TESTS), path.stem.split("_")[1:]
        names = {"_".join(words[: i + 1]) for i in range(len(words))}
        if not folder.is_dir() or not names & subjects(folder):
            strays.append(str(path.relative_to(TESTS)))
    assert strays == []


def test_places_without_a_counterpart_in_the_package_exist():
    assert ELSEWHERE
    assert all(place.exists() for place in ELSEWHERE)


def test_every_test_that_the_table_of_complaints_names_exists():
    folder = TESTS / "serve" / "http"
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == [*range(1, 33)]
    for _, cell in rows:
        named = re.findall(r"`([\w./]+\.py)::(\w+)`", cell)
        assert named
        missing = [name for file, name in named if f"def {name}(" not in (folder / file).read_text()]
        assert missing == []
