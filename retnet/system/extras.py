"""Optional libraries: the extra that brings each of them, and the error of one that is not installed.

An installation without extras is the core alone. Code that imports an optional library does so inside `needs(...)`, or
in a package whose `__init__` calls `require(...)`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

# extra -> the modules that its code imports; pyproject.toml has their versions
LIBRARIES = {
    "eval": ("lm_eval",),
    "hf": ("transformers", "tokenizers", "huggingface_hub"),
    "onnx": ("onnx", "onnxscript"),
    "plots": ("matplotlib",),
    "quantize": ("torchao",),
    "s3": ("s3fs",),
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client", "llguidance"),
    "triton": ("triton",),
    "train": ("accelerate", "transformers", "datasets", "pyarrow"),
}


class MissingExtra(ImportError):
    """A library of an extra is not installed. `name` is the library; the message names the extra."""


def require(extra: str, what: str, *libraries: str) -> None:
    """Raise MissingExtra if a library of an extra is not installed; imports nothing.

    what: begins the message: "Training", "--png". libraries: those that are needed; all of `LIBRARIES[extra]` if none.
    """
    missing = [library for library in libraries or LIBRARIES[extra] if not _is_installed(library)]
    if missing:
        raise _missing(extra, what, missing)


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Raise MissingExtra in place of the ModuleNotFoundError of an import of a library of the extra; see `require`."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in LIBRARIES[extra]:  # an installation of the library that is broken
            raise
        raise _missing(extra, what, [library]) from None


def install_command(extra: str) -> str:
    """The command that installs an extra into this environment: from the checkout, if this package is one."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        place = "." if checkout == Path.cwd() else str(checkout)
        return f"{_pip()} install -e {shlex.quote(f'{place}[{extra}]')}"
    return f"{_pip()} install {shlex.quote(f'retnet[{extra}]')}"


def _missing(extra: str, what: str, libraries: list[str]) -> MissingExtra:
    *others, last = libraries
    names = f"{', '.join(others)} and {last}" if others else last
    verb = "are" if others else "is"
    message = f"{what} needs {names}, which {verb} not installed; accepted: {install_command(extra)}"
    return MissingExtra(message, name=libraries[0])


def _is_installed(library: str) -> bool:
    if library in sys.modules:
        return sys.modules[library] is not None
    return find_spec(library) is not None


def _pip() -> str:
    """The pip of this interpreter: `pip`, if that is the one on the PATH."""
    found = shutil.which("pip")
    if found is not None and os.path.dirname(found) == os.path.dirname(sys.executable):
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"
