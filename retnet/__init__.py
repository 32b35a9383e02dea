"""Retentive Network (Sun et al. 2023, arXiv 2307.08621): one retention operator, and language models built on it.

    model = retnet.load("retnet-tiny")
    text = retnet.generate(model, "def main(", max_tokens=50)

Importing this package only defines names: those in `_EXPORTS` are imported on first use (PEP 562), so `import retnet`
loads no torch, and the command line starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> the module that defines it
_EXPORTS = {
    "load": "retnet.api",
    "load_tokenizer": "retnet.api",
    "generate": "retnet.api",
    "retention": "retnet.ops.retention",
    "retention_step_": "retnet.ops.retention",
    "retention_plan": "retnet.ops.retention",
    "ModelConfig": "retnet.models.config",
    "LanguageModel": "retnet.models.lm",
    "ModelState": "retnet.models.states",
    "Engine": "retnet.serve.engine",
    "Request": "retnet.serve.request",
    "Sampling": "retnet.models.decode.sampling",
}

if TYPE_CHECKING:
    from retnet.api import generate as generate
    from retnet.api import load as load
    from retnet.api import load_tokenizer as load_tokenizer
    from retnet.models.config import ModelConfig as ModelConfig
    from retnet.models.decode.sampling import Sampling as Sampling
    from retnet.models.lm import LanguageModel as LanguageModel
    from retnet.models.states import ModelState as ModelState
    from retnet.ops.retention import retention as retention
    from retnet.ops.retention import retention_plan as retention_plan
    from retnet.ops.retention import retention_step_ as retention_step_
    from retnet.serve.engine import Engine as Engine
    from retnet.serve.request import Request as Request

__all__ = [
    "Engine",
    "LanguageModel",
    "ModelConfig",
    "ModelState",
    "Request",
    "Sampling",
    "__version__",
    "generate",
    "load",
    "load_tokenizer",
    "retention",
    "retention_plan",
    "retention_step_",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'retnet' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
