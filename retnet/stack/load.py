"""Loading of stacks: read a file, parse it, evaluate expressions, validate, expand the schedule."""

import os
from dataclasses import dataclass, field
from pathlib import Path as FilePath

from .document import parse, read_text
from .errors import Fault, StackError
from .expressions import resolve
from .layers import Layer, expand
from .rules import check_rules
from .schema import Spec
from .validate import ReservedKey, check_sections


@dataclass(frozen=True)
class Stack:
    """A valid stack: its sections, its layers in order, and the text it came from."""

    spec: Spec
    layers: tuple[Layer, ...]
    text: str = field(repr=False)
    origin: str = ""
    reserved: tuple[ReservedKey, ...] = ()


def load_stack(path: str | os.PathLike[str]) -> Stack:
    """The stack in a file. Raises StackError with every fault, or if the file cannot be read."""
    origin = os.fspath(path)
    try:
        data = FilePath(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StackError(
            [Fault((), f"'{origin}' cannot be read: {reason}", "give the path of a stack file")], origin
        ) from None
    except ValueError as error:  # a path with a null character
        raise StackError([Fault((), f"this is not a path: {error}", "give the path of a stack file")], origin) from None
    return parse_stack(read_text(data, origin), origin)


def parse_stack(text: str, origin: str = "") -> Stack:
    """The stack in a text; `origin` is where it came from. Raises StackError with every fault."""
    document = parse(text, origin)
    checked = check_sections(document, resolve(document))
    faults = [*document.faults, *checked.faults, *check_rules(checked.sections, document)]
    if faults or checked.spec is None:
        raise StackError(sorted(faults, key=_place), origin)
    return Stack(checked.spec, expand(checked.spec), text, origin, tuple(checked.reserved))


def _place(fault: Fault) -> tuple[int, int]:
    return (fault.mark.line, fault.mark.column) if fault.mark else (0, 0)
