"""Closed choices: fields of dataclasses whose annotation is a `Literal`.

A dataclass does not check its annotations. A misspelt choice would be taken for another one: a gate that the layer does
not know builds a layer without a gate.
"""

import dataclasses
import types
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from retnet.system.checks import quoted
from retnet.system.suggest import choices


def is_choice(value: object, accepted: Iterable[object]) -> bool:
    """Whether the value is one of the accepted ones; True is not 1."""
    for x in accepted:
        if value is x:
            return True
        if isinstance(value, type(x)) and isinstance(value, bool) == isinstance(x, bool) and value == x:
            return True
    return False


def check_choices(config: Any) -> None:
    """Check the fields of a dataclass that are a `Literal`, a `Literal` or None, or a tuple of a `Literal`.

    Raises ValueError that names the field, what was given and what is accepted.
    """
    for name, accepted, several in _choices(type(config)):
        value = getattr(config, name)
        if several and not isinstance(value, tuple):
            raise ValueError(f"{name} is {quoted(value)}; accepted: a tuple of {_listed(accepted)}")
        for item in value if several else (value,):
            if not is_choice(item, accepted):
                what = f"has {quoted(item)} in it" if several else f"is {quoted(item)}"
                raise ValueError(f"{name} {what}; {choices(item, map(str, accepted))}")


@cache
def _choices(cls: type) -> tuple[tuple[str, tuple, bool], ...]:
    """Per checked field: its name, the accepted values, and whether it is a tuple of them."""
    hints = get_type_hints(cls)
    choices = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        several = get_origin(hint) is tuple
        accepted = _accepted(get_args(hint)[0] if several else hint)
        if accepted:
            choices.append((field.name, accepted, several))
    return tuple(choices)


def _accepted(hint: Any) -> tuple:
    """The values of a closed choice; none for other annotations."""
    if hint is None or hint is type(None):
        return (None,)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_accepted(part) for part in get_args(hint)]
        closed = all(parts) and parts != [(None,)]
        return tuple(value for part in parts for value in part) if closed else ()
    return ()


def _listed(accepted: Iterable[object]) -> str:
    return ", ".join(map(str, accepted))
