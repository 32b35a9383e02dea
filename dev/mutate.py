"""Mutation testing: breaks one place of the package at a time and lists the breaks that no test notices.

    python dev/mutate.py --count 40 --seed 15                 places drawn evenly from the rooms
    python dev/mutate.py --count 40 --seed 15 --list          the same places, nothing run
    python dev/mutate.py --at retnet/eval/meter.py:40         every mutation of one line

A mutation changes one operator, constant, condition, call, keyword or returned value. Each runs in a scratch copy of
the tree against the tests of its module: the file that mirrors it and the files that import it; if these pass, all
tests of its folder; if these pass, too, the tests of the modules that import it. A failure counts when the failing test
passes without the mutation.

Left out: kernels (their tests run in a process of their own), drawings, and what tests should not pin down: type hints,
error and log texts, `__repr__`. A survivor is a missing test, or a place where the change means nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_MUTATED = ("retnet/kernels/", "/__main__.py", "/picture.py", "/figures.py", "/curve.py", "/lengths_plot.py")
NOT_COPIED = (".git", ".venv*", "out", "dist", "build", ".*_cache", "__pycache__", ".hypothesis")

OPERATORS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*",
    ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*", ast.And: "or", ast.Or: "and", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
OPERATOR = re.compile(r"\bis\s+not\b|\bnot\s+in\b|\b(is|in|and|or)\b|[<>=!]=|//|\*\*|[-+*/%<>&|]")
# Calls whose arguments are words for people.
TELLING = re.compile(r"(^|\.)(print|echo|warn|warning|info|debug|log|add_row|add_column|Option|Argument|Field|status)$")


@dataclass(frozen=True)
class Mutation:
    """Bytes start to stop of a file replaced by `after`."""

    path: str
    line: int
    start: int
    stop: int
    before: str
    after: str

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line}  {before[:70]}  ->  {after[:70]}"

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.stop :]


class Finder(ast.NodeVisitor):
    """Every mutation of one file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source, self.found = path, source, list[Mutation]()
        self.offsets = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        self.visit(ast.parse(source))

    def text(self, node: ast.expr | ast.stmt) -> str:
        return self.source[slice(*self.span(node))].decode()

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return self.offsets[node.lineno - 1] + node.col_offset, self.offsets[end_line - 1] + end_column

    def replace(self, node: ast.expr | ast.stmt | ast.keyword, after: str) -> None:
        start, stop = self.span(node)
        self.found.append(Mutation(self.path, node.lineno, start, stop, self.source[start:stop].decode(), after))

    def between(self, left: ast.expr, right: ast.expr, kind: ast.AST) -> None:
        """The operator between two operands."""
        (first, start), (stop, last) = self.span(left), self.span(right)
        gap = self.source[start:stop].decode()
        match = OPERATOR.search(gap)
        if type(kind) in OPERATORS and match and "#" not in gap[: match.start()]:
            changed = gap[: match.start()] + OPERATORS[type(kind)] + gap[match.end() :]
            before, after = (self.text(left) + text + self.text(right) for text in (gap, changed))
            self.found.append(Mutation(self.path, left.lineno, first, last, before, after))

    # Parts of the syntax tree that are not mutated.
    def visit_Raise(self, node: ast.Raise) -> None: ...
    def visit_Import(self, node: ast.Import) -> None: ...
    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...
    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults and body: no decorators, no annotations."""
        if node.name not in ("__repr__", "__str__"):
            for child in (*node.args.defaults, *node.args.kw_defaults, *node.body):
                if child is not None:
                    self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for child in node.body:
            self.visit(child)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A module's aliases of types are annotations, too."""
        if not (isinstance(node.value, ast.Subscript) and self.text(node.value).startswith(("Literal", "Callable"))):
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in self.text(node.test):
            self.replace(node.test, f"not ({self.text(node.test)})")
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace(node.test, f"(not ({self.text(node.test)}))")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, kind, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            self.between(left, right, kind)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, node.op)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        strings = [x for x in ast.walk(node) if isinstance(x, ast.JoinedStr) or _is_string(x)]
        classes = isinstance(node.op, ast.BitOr) and re.fullmatch(r"[\w. |]+", self.text(node))
        if not strings and not classes:
            self.between(node.left, node.right, node.op)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.replace(node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not _is_string(node.value) and not isinstance(node.value, ast.JoinedStr):
            self.between(node.target, node.value, node.op)
        self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value))
        elif isinstance(value, int):
            self.replace(node, str(value + 1))
        elif isinstance(value, float):
            self.replace(node, repr(2 * value if value else 1.0))

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace(node, "return None")
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not TELLING.search(self.text(node.value.func)):
            self.replace(node, "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if TELLING.search(self.text(node.func)) or self.text(node.func) in ("cast", "isinstance"):
            return
        for keyword in node.keywords:
            if keyword.arg is not None and not _is_string(keyword.value):
                start, stop = self.span(keyword)
                comma = re.match(rb"\s*,", self.source[stop : stop + 100])
                before = self.source[start:stop].decode()
                stop += comma.end() if comma else 0
                self.found.append(Mutation(self.path, keyword.lineno, start, stop, before, ""))
        self.generic_visit(node)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def mutations_of(path: Path) -> list[Mutation]:
    return Finder(path.relative_to(ROOT).as_posix(), path.read_bytes()).found


def parses(mutation: Mutation) -> bool:
    """Whether the mutated file is valid Python; removing a keyword before a positional argument, for one, is not."""
    try:
        ast.parse(mutation.applied((ROOT / mutation.path).read_bytes()))
    except SyntaxError:
        return False
    return True


def rooms() -> dict[str, list[Path]]:
    """Folder -> its modules."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "retnet").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not any(part in name for part in NOT_MUTATED):
            found.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return found


def drawn(count: int, seed: int) -> list[Mutation]:
    """Mutations spread evenly over the rooms, and drawn with equal probability inside each."""
    generator = random.Random(seed)
    by_room = {room: [m for path in paths for m in mutations_of(path)] for room, paths in rooms().items()}
    by_room = {room: found for room, found in by_room.items() if len(found) > 10}
    order, chosen = sorted(by_room), list[Mutation]()
    generator.shuffle(order)
    for number in range(count):
        places = by_room[order[number % len(order)]]
        mutation = generator.choice(places)
        while mutation in chosen or not parses(mutation):
            mutation = generator.choice(places)
        chosen.append(mutation)
    return chosen


def stages(path: str) -> Iterator[list[str]]:
    """Test files of a module: its mirror and those that import it; its folder; those that import its importers."""
    done: set[Path] = set()
    importers = [file for file in sorted((ROOT / "retnet").rglob("*.py")) if _imports(file, path)]
    beyond = [file for other in importers for file in _near(other.relative_to(ROOT).as_posix())]
    for stage in (_near(path), sorted(_folder(path).glob("test_*.py")), beyond):
        new = [file for file in dict.fromkeys(stage) if file not in done]
        done.update(new)
        if new:
            yield [file.relative_to(ROOT).as_posix() for file in new]


def _near(path: str) -> list[Path]:
    name = Path(path).stem
    mirror = [*_folder(path).glob(f"test_{name}.py"), *_folder(path).glob(f"test_{name}_*.py")]
    return mirror + [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if _imports(file, path)]


def _folder(path: str) -> Path:
    """The folder of tests that mirrors a module's folder, or the one above it."""
    folder = ROOT / Path(path.replace("retnet", "tests", 1)).parent
    return folder if folder.is_dir() else folder.parent


def _imports(file: Path, path: str) -> bool:
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, name = module.rpartition(".")
    pattern = rf"\b{re.escape(module)}\b|from {re.escape(parent)} import [^\n]*\b{name}\b"
    return file != ROOT / path and re.search(pattern, file.read_text()) is not None


class Scratch:
    """A copy of the tree in which mutations are made and tests run."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        if (ROOT.parent / "shared").is_dir():  # reference data that some tests read
            (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())

    def run(self, tests: list[str], limit: float, *options: str) -> subprocess.CompletedProcess[str] | None:
        """The finished test run; None if it took more than `limit` seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not gpu and not slow", "-p", "no:cacheprovider"]
        environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            return subprocess.run(
                [*command, *options, *tests],
                cwd=self.tree, env=environment, timeout=limit, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None

    def outcome(self, mutation: Mutation, limit: float) -> str:
        """`killed by` a test, `survived`, or `timeout`."""
        file = self.tree / mutation.path
        source = file.read_bytes()
        file.write_bytes(mutation.applied(source))
        try:
            return next(
                (found for stage in stages(mutation.path) if (found := self._stage(file, source, stage, limit))),
                "survived",
            )
        finally:
            file.write_bytes(source)

    def _stage(self, file: Path, source: bytes, tests: list[str], limit: float) -> str | None:
        broken, deselected = file.read_bytes(), list[str]()
        while True:
            result = self.run(tests, limit, *(f"--deselect={name}" for name in deselected))
            if result is None:
                return "timeout"
            if result.returncode in (0, 5):
                return None
            failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.*?)?)(?: - |$)", result.stdout, re.M)
            if failed is None:
                return f"killed: {(result.stdout + result.stderr).strip().splitlines()[-1][:100]}"
            name = failed[1]
            file.write_bytes(source)
            sound = self.run([name], limit)
            file.write_bytes(broken)
            if sound is not None and sound.returncode == 0:
                return f"killed by {name}"
            deselected.append(name)  # it fails without the mutation, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", nargs="*", metavar="FILE:LINE", help="every mutation of these lines instead")
    parser.add_argument("--list", action="store_true", help="print the places and run nothing")
    parser.add_argument("--limit", type=float, default=600, help="seconds per run of the tests")
    options = parser.parse_args()
    if options.at:
        places = [place.rpartition(":") for place in options.at]
        chosen = [m for path, _, line in places for m in mutations_of(ROOT / path) if m.line == int(line) and parses(m)]
    else:
        print(f"seed {options.seed}, {options.count} places", flush=True)
        chosen = drawn(options.count, options.seed)
    if options.list:
        print(*chosen, sep="\n")
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        for number, mutation in enumerate(chosen, 1):
            begun = time.monotonic()
            results.append(scratch.outcome(mutation, options.limit).split()[0].strip(":"))
            print(f"{number:3} {results[-1]:8} {time.monotonic() - begun:4.0f} s  {mutation}", flush=True)
    print(", ".join(f"{results.count(kind)} {kind}" for kind in ("killed", "timeout", "survived")))


if __name__ == "__main__":
    main()
