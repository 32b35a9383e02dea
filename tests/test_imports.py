"""Imports point down only, and importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.paths import ROOT

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "triton", "pydantic")
QUICK = 0.3  # seconds of the CPU, the interpreter's start included
TRIES = 4  # on a busy machine, a process may take longer


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_contracts_hold():
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize(
    "code",
    [
        "import retnet",
        "import retnet.cli",
        "import retnet.cli\ntry: retnet.cli.main(['--version'])\nexcept SystemExit as done: assert done.code == 0",
        "import retnet.cli\ntry: retnet.cli.main(['--help'])\nexcept SystemExit as done: assert done.code == 0",
    ],
    ids=["package", "command line", "version", "help"],
)
def test_importing_version_and_help_load_no_heavy_package_and_are_quick(code):
    seconds = []
    while not seconds or (seconds[-1] > QUICK and len(seconds) < TRIES):
        told = run_python(
            f"{code}\nimport sys, time\nprint(*[m for m in {HEAVY!r} if m in sys.modules], sep=',')\n"
            "print(time.process_time())"
        )
        *_, loaded, used = told.splitlines()
        assert loaded == ""
        seconds.append(float(used))
    assert min(seconds) < QUICK


def test_importing_changes_neither_the_environment_nor_logging():
    output = run_python(
        "import os, logging\n"
        "before = dict(os.environ), logging.root.level, list(logging.root.handlers)\n"
        "import retnet, retnet.data, retnet.eval.compressors, retnet.cli\n"
        "after = dict(os.environ), logging.root.level, list(logging.root.handlers)\n"
        "print(before == after)"
    )
    assert output.strip() == "True"


def test_every_public_name_can_be_imported():
    import retnet

    for name in retnet.__all__:
        assert getattr(retnet, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_lists_the_exports():
    import retnet

    with pytest.raises(AttributeError, match=r"no attribute 'retenion'; it exports .*retention"):
        _ = retnet.retenion


@pytest.mark.parametrize("package", ["retnet", "retnet/data"])
def test_type_checkers_see_the_names_that_are_imported_on_first_use(package):
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    (seen,) = (node.body for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in seen if isinstance(node, ast.ImportFrom)]
    checked = {alias.asname: node.module for node in imports for alias in node.names}
    (table,) = (node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "_EXPORTS")
    assert checked == ast.literal_eval(table)
