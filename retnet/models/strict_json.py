"""Strict conversion between plain data and nested frozen dataclasses: errors name the path of an unknown or wrong key.

Used for model configurations, whose JSON must survive years. Dataclasses that may stand in one place are told apart by
their `kind`: those of a union, or those that the field's metadata gives (`kinds`, a function that returns kind ->
class), for kinds that are registered elsewhere.
"""

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from retnet.system.checks import quoted
from retnet.system.choices import is_choice
from retnet.system.suggest import choices, did_you_mean

T = TypeVar("T")
MAX_DEPTH = 32  # of dataclasses in dataclasses


def to_dict(value: Any) -> Any:
    """Dataclasses to dictionaries, tuples to lists; everything else is already plain."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, path: str = "config") -> T:
    """Build dataclass `cls` from `data`. Raises ValueError naming the path, what was given and what is accepted."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected a mapping of {cls.__name__}, got {_name(data)}")
    if path.count(".") > MAX_DEPTH:
        raise ValueError(f"{path}: nested more than {MAX_DEPTH} levels deep")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            meant = did_you_mean(str(key), known)
            raise ValueError(f"{path}.{key}: unknown key{meant} Accepted: {', '.join(known)}")
    annotations = get_type_hints(cls)
    values = {key: _convert_field(known[key], annotations[key], item, f"{path}.{key}") for key, item in data.items()}
    missing = [n for n, f in known.items() if n not in values and _required(f)]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert_field(field: dataclasses.Field, annotation: Any, value: Any, path: str) -> Any:
    kinds = field.metadata.get("kinds")
    if kinds is None:
        return _convert(annotation, value, path)
    if get_origin(annotation) is tuple:
        return tuple(_convert_kind(kinds(), item, f"{path}[{i}]") for i, item in enumerate(_listed(value, path)))
    return _convert_kind(kinds(), value, path)


def _convert_kind(classes: Mapping[str, type], value: Any, path: str) -> Any:
    """A dataclass of one of several kinds."""
    if isinstance(value, tuple(classes.values())):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected a mapping with a kind, got {_name(value)}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"{path}.kind: {quoted(kind)} given; {choices(kind, classes)}")
    return from_dict(classes[kind], value, path)


def _convert(annotation: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if not is_choice(value, args):
            raise ValueError(f"{path}: {quoted(value)} given; {choices(value, map(str, args))}")
        return value
    if origin is tuple:
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(_listed(value, path)))
    if dataclasses.is_dataclass(annotation):
        cls = cast(type, annotation)
        return value if isinstance(value, cls) else from_dict(cls, value, path)
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # NaN too
            raise ValueError(f"{path}: expected a finite number, got {_name(value)}")
        return float(value)
    if annotation is int and isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{path}: expected an integer of 64 bits, got {_name(value)}")
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ValueError(f"{path}: expected {annotation.__name__}, got {_name(value)}")
    return value


def _convert_union(args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    classes = {cast(Any, a).kind: cast(type, a) for a in args if dataclasses.is_dataclass(a) and hasattr(a, "kind")}
    if classes and isinstance(value, Mapping):
        return _convert_kind(classes, value, path)
    errors = []
    for annotation in args:
        if annotation is type(None):
            continue
        try:
            return _convert(annotation, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(" or ".join(errors))


def _listed(value: Any, path: str) -> list | tuple:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}: expected a list, got {_name(value)}")
    return value


def _name(value: Any) -> str:
    return f"{type(value).__name__} {quoted(value)}"
