"""A pytest plugin that writes the specifications which EulerStack's own tests accept to `eulerstack_specs.json`.

    PYTHONPATH=benchmarks:EULERSTACK pytest -p eulerstack_specs --continue-on-collection-errors EULERSTACK/tests

EULERSTACK is its source distribution, unpacked. Its preset files are not part of it, so the tests that read them fail.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import eulerstack.spec.validate as checks  # pyright: ignore[reportMissingImports]

_original = checks.validate_v2
_accepted: dict[str, None] = {}  # as text, so that equal ones count once


def _recorded(raw: Any) -> Any:
    text = json.dumps(raw, default=str)  # as it came: checking may change it
    checked = _original(raw)
    _accepted[text] = None
    return checked


def _replace() -> None:
    """Replace the function wherever a module imported it by name."""
    for module in [*sys.modules.values()]:
        if getattr(module, "validate_v2", None) is _original:
            module.validate_v2 = _recorded  # type: ignore[union-attr]


def pytest_configure() -> None:
    _replace()


def pytest_collection_finish() -> None:
    _replace()


def pytest_sessionfinish() -> None:
    Path("eulerstack_specs.json").write_text(json.dumps([json.loads(text) for text in _accepted], indent=1))
