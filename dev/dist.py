"""Release check: the wheel and the sdist of this tree, their contents, and the wheel in empty environments.

    python dev/dist.py                                both environments (about 5 minutes on two cores)
    python dev/dist.py --keep FOLDER                  keep the environments there
    python dev/dist.py --only core --python python3.12

Needs `build` and `twine`; `make dist` installs them. The environments get the wheel with pip, under constraints.txt:

    core      the wheel alone: commands, every missing extra by its message, tests of what the core does. One extra is
              then installed with the words of its own error.
    extras    the wheel with `EXTRAS`: training, the server with its page, the Python interface and transformers.

The tests run in a folder without the package, so that they import what was installed. Prints the size of the core
environment and the seconds of `import retnet`, `retnet --version` and `retnet --help`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
EXTRAS = "train,serve"
TEST_TOOLS = ["pytest>=8.4", "hypothesis>=6.130"]
CORE_TESTS = [
    "tests/test_without_extras.py",
    "tests/system",
    "tests/ops/test_retention.py",
    "tests/models/test_directory.py",
    "tests/models/test_states.py",
    "tests/models/test_snapshot.py",
    "tests/stack/test_presets.py",
    "tests/cli/test_chat_local.py",
    "tests/eval/test_bits.py",
]
EXTRA_TESTS = [
    "tests/test_api.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_data.py",
    "tests/serve/http/test_page.py",
    "tests/serve/http/test_service.py",
    "tests/hf/test_save_and_load.py",
]
# Of the wheel, beside Python: type information, stack presets, the page of the server.
DATA = {"py.typed": 1, ".yml": 20, ".js": 10, ".html": 1, ".css": 1, ".svg": 1}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
# Of the sdist, beside what pyproject.toml includes: what the build always adds.
ADDED = {"LICENSE", "README.md", "pyproject.toml"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--torch-index", help="index for torch alone, such as PyTorch's CPU index")
    parser.add_argument("--only", choices=["files", "core", "extras"], help="one part (default: all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for the environments")
    options = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory(prefix="retnet-dist-") as temporary:
        place = options.keep or Path(temporary)
        if options.only in (None, "core"):
            try_core(Environment(place / "core", options, wheel), wheel)
        if options.only in (None, "extras"):
            try_extras(Environment(place / "extras", options, f"{wheel}[{EXTRAS}]"))
    print(f"\n{wheel.name} and {sdist.name} in {DIST} are as they should be")


def check_wheel(wheel: Path) -> None:
    """Every file of the package and nothing else, and the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    expect("metadata", {name.removeprefix(f"{info}/") for name in names if name.startswith(info)}, METADATA)
    package = {name for name in tracked("retnet") if not name.endswith(".md")}
    expect("package", {name for name in names if not name.startswith(info)}, package)
    for suffix, least in DATA.items():
        if (count := sum(name.endswith(suffix) for name in package)) < least:
            sys.exit(f"the wheel has {count} files that end in {suffix}; expected: at least {least}")


def check_sdist(sdist: Path) -> None:
    """Every file of the places that pyproject.toml includes and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    places = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    expect("sdist", names - {".gitignore", "PKG-INFO"}, tracked(*(p.lstrip("/") for p in places["include"]), *ADDED))


def tracked(*places: str) -> set[str]:
    """The files of these places that belong to the repository."""
    listed = subprocess.run(["git", "ls-files", *places], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def expect(what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        sys.exit(f"{what}: {sorted(found - wanted)} should not be there, {sorted(wanted - found)} is missing")
    print(f"{what}: {len(found)} entries, as expected")


class Environment:
    """A virtual environment with the wheel, and a folder beside it from which its commands run."""

    def __init__(self, place: Path, options: argparse.Namespace, requirement: Path | str):
        self.place, self.work = place / "environment", place / "work"
        shutil.rmtree(place, ignore_errors=True)
        self.work.mkdir(parents=True)
        run(options.python, "-m", "venv", self.place)
        self.bin = self.place / "bin"
        if options.torch_index:
            self.install("--index-url", options.torch_index, "torch")
        self.install(str(requirement))
        shutil.copytree(ROOT / "tests", self.work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", self.work)

    def install(self, *requirements: str) -> None:
        run(self.bin / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *requirements)

    def run(self, *words: str) -> str:
        """The output of a program of this environment."""
        return run(self.bin / words[0], *words[1:], cwd=self.work, path=self.bin)

    def test(self, *tests: str) -> None:
        self.install(*TEST_TOOLS)
        where = self.run("python", "-c", "import retnet; print(retnet.__file__)").strip()
        if self.place not in Path(where).parents:
            sys.exit(f"the tests import {where}; expected: the package in {self.place}")
        print(self.run("python", "-m", "pytest", "-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider", *tests))


def try_core(core: Environment, wheel: Path) -> None:
    """The core: its size, the time it takes to start, its commands, its tests, and an extra added to it."""
    version = wheel.name.split("-")[1]
    (torch,) = core.place.glob("lib/python*/site-packages/torch")
    print(f"core environment: {size_of(core.place):,.0f} MB, {size_of(torch):,.0f} MB of it torch")
    for words in (["python", "-c", "import retnet"], ["retnet", "--version"], ["retnet", "--help"]):
        print(f"{' '.join(words)}: {least_seconds(core, words):.2f} s")
    if core.run("retnet", "--version").strip() != f"retnet {version}":
        sys.exit(f"retnet --version does not say {version}")
    text = core.work / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} " * 20)
    stack = "arch_advanced_retnet_mini"
    core.run("retnet", "generate", "retnet-tiny", "x", "--max-tokens", "5")
    core.run("retnet", "check", "operator", "--length", "64")
    core.run("retnet", "info", "retnet-1.3b")
    core.run("retnet", "stack", "compile", stack, "-o", "model")
    core.run("python", "-m", "retnet", "eval", "model", "--data", "text")
    core.run("retnet", "data", "text", "tokens")
    told = core.run("retnet", "data", "show", "tokens")
    command = next(line for line in told.splitlines() if "[plots]" in line).split("accepted: ")[1]
    core.test(*CORE_TESTS)
    run(*shlex.split(command), cwd=core.work, path=core.bin)
    core.run("retnet", "info", "retnet-tiny", "--png", "model.png")


def try_extras(extras: Environment) -> None:
    extras.install("httpx>=0.28")
    extras.run("retnet", "train", "model=retnet-tiny", "data=stdlib", "max_steps=2", "length=64", "output_dir=trained")
    extras.run("retnet", "generate", "trained", "def ", "--max-tokens", "5", "--png", "stream.png")
    extras.test(*EXTRA_TESTS)


def size_of(folder: Path) -> float:
    """Megabytes of the files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6


def least_seconds(environment: Environment, words: list[str]) -> float:
    """CPU seconds of a program, the least of five runs."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment.run(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def run(*words: str | Path, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run a program and return its output; ends this program with it if the exit code is not 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for each other
    if path is not None:
        environment |= {"PATH": f"{path}{os.pathsep}{environment['PATH']}", "VIRTUAL_ENV": str(path.parent)}
    print("$", shlex.join(map(str, words)), flush=True)
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
