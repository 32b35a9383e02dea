"""The core alone: an optional library is imported where its error names an extra, and every such error is one line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import retnet
from retnet.system.extras import LIBRARIES
from tests.paths import ROOT

CORE = {
    "torch", "safetensors", "numpy", "pydantic", "pydantic_core", "yaml", "typer", "rich", "jinja2", "packaging",
    "fsspec", "retnet",
}  # fmt: skip
# Packages whose `__init__` raises MissingExtra, so that their modules import these libraries as any other.
GUARDED = {
    "retnet/kernels": {"triton"},
    "retnet/models/hf": {"transformers", "tokenizers"},
    "retnet/serve/http": {*LIBRARIES["serve"]},
    "retnet/train": {"transformers", "accelerate"},
}

# What needs an extra, and the extra that the error names.
MODULES = {
    "retnet.hf": "hf",
    "retnet.kernels.decode.linear": "triton",
    "retnet.plots.frame": "plots",
    "retnet.serve.http.app": "serve",
    "retnet.train.recipe": "train",
}
COMMANDS = {
    "data rows.parquet OUT": "train",
    "data text.zst OUT": "train",
    "data s3://bucket/text.txt OUT": "s3",
    "data hf:name OUT": "train",
    "data text.txt OUT --tokenizer tokenizer.json": "hf",
    "data text.txt OUT --tokenizer some/name": "hf",
    "data show text.txt --plot x.png": "plots",
    "eval retnet-tiny --tasks arc": "eval",
    "generate retnet-tiny x --int8": "quantize",
    "generate retnet-tiny x --png x.png": "plots",
    "info retnet-tiny --png x.png": "plots",
    "serve retnet-tiny": "serve",
    "stack explain arch_advanced_retnet_mini --picture x.png": "plots",
    "train recipe.yaml": "train",
}
RUN = """
import importlib, sys
from retnet.cli import main

sys.modules.update(dict.fromkeys(blocked))  # importing them raises ModuleNotFoundError
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{module}: {type(error).__name__}: {error}", flush=True)
for command in commands:
    try:
        main(command.split())
    except SystemExit as end:
        print(f"{command}: exit code {end.code}", flush=True)
"""
IMPORT = re.compile(r"^\s*(?:import|from) (\w+)", re.MULTILINE)


def unguarded(text: str, allowed: set[str]) -> list[str]:
    """The libraries that code imports outside `with needs(...)` and `if TYPE_CHECKING`, other than those allowed."""
    allowed = allowed | sys.stdlib_module_names
    if allowed.issuperset(IMPORT.findall(text)):  # as in most files, which need no closer look
        return []
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.With() if ast.unparse(node.items[0].context_expr).startswith("needs("):
                continue
            case ast.If() if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                continue
            case ast.Import():
                found += [alias.name.partition(".")[0] for alias in node.names]
            case ast.ImportFrom(level=0):
                found.append(str(node.module).partition(".")[0])
        waiting += ast.iter_child_nodes(node)
    return sorted({*found} - allowed)


def test_an_optional_library_is_imported_where_its_error_names_the_extra():
    strays = []
    package = Path(retnet.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        allowed = CORE.union(*(libraries for folder, libraries in GUARDED.items() if name.startswith(f"{folder}/")))
        strays += [f"{name} imports {library}" for library in unguarded(path.read_text(), allowed)]
    assert strays == []


def test_the_search_for_unguarded_imports_finds_them():
    code = (
        "def f():\n    import torch, lm_eval.tasks\n"
        "with open(x):\n    from peft import y\n"
        "with needs('a', 'b'):\n    import trl\n"
        "if TYPE_CHECKING:\n    import fla\n"
    )
    assert unguarded(code, CORE) == ["lm_eval", "peft"]


def test_every_missing_extra_is_named_in_one_message_before_torch_is_loaded(tmp_path):
    for name in ("rows.parquet", "text.zst", "text.txt", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    blocked = {"torch", *(library for libraries in LIBRARIES.values() for library in libraries)}
    code = f"blocked, modules, commands = {blocked!r}, {[*MODULES]!r}, {[*COMMANDS]!r}\n{RUN}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    lines = iter(done.stdout.splitlines())
    for module, extra in MODULES.items():
        line = next(lines)
        assert line.startswith(f"{module}: MissingExtra: ")
        assert line.endswith(f"[{extra}]'")
    for command, extra in COMMANDS.items():
        error, *others = iter(lambda: next(lines), f"{command}: exit code 2")
        assert error.startswith("error: ")
        assert error.endswith(f"[{extra}]'")
        assert all(line.startswith("`retnet --debug") for line in others)
    assert list(lines) == []
