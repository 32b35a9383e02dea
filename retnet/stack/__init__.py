"""Stacks: architectures written in EulerStack's YAML (schema_version 1), validated and compiled to models.

`load_stack(file)` returns a `Stack`, or raises `StackError` with every fault of the file. The guide is
docs/reference/stack.md.
"""

from .errors import Category, Fault, StackError
from .load import Stack, load_stack, parse_stack

__all__ = ["Category", "Fault", "Stack", "StackError", "load_stack", "parse_stack"]
