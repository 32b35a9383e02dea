"""Validation of a document against the schema, with all faults collected.

The first pass compares keys with the schema, and removes unknown keys, unsupported keys and reserved prefixes. The rest
is validated by pydantic, which finds missing keys and wrong values. The rules between sections (`rules`) then run on
the sections that are valid by themselves, so that a fault in one section does not hide those of others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from retnet.system.suggest import nearest

from .document import Document
from .errors import Category, Fault, Mark, Path, listing, plain, show
from .mixers import MIXERS
from .scalars import FAULT
from .schema import (
    BodyEntry,
    Embedding,
    Entry,
    ExecutionMode,
    Head,
    Model,
    ParallelEntry,
    Spec,
    State,
    Template,
    TokenizerContract,
    TrainingHints,
    entry_section,
)
from .section import OURS, RESERVED_PREFIXES, Section
from .unsupported import ENTRY_KINDS, STATE_KEYS, Unsupported

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class ReservedKey:
    """A key with a reserved prefix. It has no effect, which the report says."""

    path: Path
    mark: Mark | None


@dataclass(frozen=True)
class ParsedSections:
    """The sections that are valid by themselves; the others are None or absent."""

    model: Model | None
    tokenizer: TokenizerContract | None
    embedding: Embedding | None
    head: Head | None
    hints: TrainingHints | None
    templates: dict[str, Template]
    entries: dict[int, Entry | ParallelEntry]
    names: frozenset[str]  # of all templates in the file, valid or not
    modes: dict[int, ExecutionMode]


@dataclass
class Checked:
    """The result of validating a document. spec: None if there is a fault."""

    spec: Spec | None
    sections: ParsedSections
    faults: list[Fault]
    reserved: list[ReservedKey]


def check_sections(document: Document, root: dict[str, Any]) -> Checked:
    """Validate every section of a document by itself. root: its value, with expressions evaluated."""
    pruner = _Pruner(document)
    pruned = pruner.prune(Spec, root, ())
    spec = None
    try:
        spec = Spec.model_validate(pruned)
    except ValidationError as error:
        found = (_fault(details, document) for details in error.errors(include_url=False))
        pruner.faults += [fault for fault in found if fault]
    return Checked(spec, _valid_sections(pruned), pruner.faults, pruner.reserved)


class _Pruner:
    """Removes and reports the keys that are not in the schema or not supported."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[Fault] = []
        self.reserved: list[ReservedKey] = []

    def prune(self, section: type[Section], raw: Any, path: Path) -> Any:
        """`raw` with only the keys of the section."""
        if not isinstance(raw, dict):
            return raw
        if section is Entry:
            kind = next((key for key in ENTRY_KINDS if key in raw), None)
            if kind:
                self._refuse(path, kind, ENTRY_KINDS[kind], self.document.mark((*path, kind), key=True))
                self.document.broken.add(path)
                return raw
            section = entry_section(raw)
        if section is BodyEntry and (nested := next((key for key in ("parallel", "integrator") if key in raw), None)):
            mark = self.document.mark((*path, nested), key=True)
            fix = "write its layers in the body, each as `template`"
            self.faults.append(Fault(path, f"a stream cannot contain `{nested}`", fix, mark=mark))
            self.document.broken.add(path)
            return raw
        if section is Template:
            raw = self._without_foreign_states(raw, path)
        raw = self._without_unsupported_values(section, raw, path)
        known = section.keys()
        kept: dict[str, Any] = {}
        for key, value in raw.items():
            here = (*path, key)
            if key in known:
                kept[key] = self._descend(known[key], value, here)
            elif key in section.UNSUPPORTED:
                refused = section.UNSUPPORTED[key]
                if value is not None or not refused.takes_null:
                    self._refuse(here, key, refused, self.document.mark(here, key=True))
            elif key.startswith(RESERVED_PREFIXES) and not key.startswith(OURS):
                self.reserved.append(ReservedKey(here, self.document.mark(here, key=True)))
            else:
                self._unknown(key, section, path)
        return kept

    def _descend(self, annotation: Any, value: Any, path: Path) -> Any:
        section = next(_sections_in(annotation), None)
        if section is None:
            return value
        if get_origin(annotation) is dict and isinstance(value, dict):
            return {key: self.prune(section, item, (*path, key)) for key, item in value.items()}
        if list in (get_origin(annotation), *map(get_origin, get_args(annotation))) and isinstance(value, list):
            return [self.prune(section, item, (*path, i)) for i, item in enumerate(value)]
        return self.prune(section, value, path)

    def _without_unsupported_values(self, section: type[Section], raw: dict[str, Any], path: Path) -> dict[str, Any]:
        for key, values in section.UNSUPPORTED_VALUES.items():
            value = raw.get(key)
            refused = values.get(value) if isinstance(value, str) else None
            if refused:
                self._refuse(path, f"{key}: {value}", refused, self.document.mark((*path, key)))
                self.document.broken.add((*path, key))
                return {name: item for name, item in raw.items() if name not in (key, *refused.companions)}
        return raw

    def _without_foreign_states(self, template: dict[str, Any], path: Path) -> dict[str, Any]:
        """Refuse a state that the mixer does not have, of whatever value, for unsupported mixers too."""
        keys = {name: settings.STATE_KEY for name, settings in MIXERS.items()} | STATE_KEYS
        mixer, state = template.get("mixer"), template.get("state")
        kind = mixer.get("type") if isinstance(mixer, dict) else None
        if not isinstance(kind, str) or kind not in keys or not isinstance(state, dict):
            return template
        own = keys[kind]
        foreign = [key for key in State.model_fields if key != own and state.get(key)]
        for key in foreign:
            fix = f"write state: {{{own}: true}}" if own else "remove `state`"
            mark = self.document.mark((*path, "state", key))
            self.faults.append(Fault(path, f"a {kind} mixer has no {key}", fix, Category.COMPATIBILITY, mark))
        return {**template, "state": {key: value for key, value in state.items() if key not in foreign}}

    def _refuse(self, path: Path, key: str, refused: Unsupported, mark: Mark | None) -> None:
        what = f"`{key}` ({refused.what}) is not supported here"
        self.faults.append(Fault(path, what, refused.instead, Category.UNSUPPORTED, mark))

    def _unknown(self, key: str, section: type[Section], path: Path) -> None:
        known, ours = section.keys(), key.startswith(OURS)
        names = [name for name in known if name.startswith(OURS) == ours] + ["let"] * (not path)
        word = key.removeprefix(OURS)
        meant = OURS + section.ALSO_CALLED.get(word, word)  # a key of ours, without its prefix or by another name
        close = meant if meant in known else nearest(key, tuple(names))
        guess = f"did you mean {close}? " if close else "remove it; "
        fix = f"{guess}keys known here: {listing(names) or f'none under {OURS}*'}"
        mark = self.document.mark((*path, key), key=True)
        self.faults.append(Fault(path, f"unknown key '{plain(key)}'", fix, mark=mark))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections in an annotation such as `Norm | None` or `dict[str, Template]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _fault(details: ErrorDetails, document: Document) -> Fault | None:
    """The fault for an error of pydantic; None for a consequence of a fault that is already reported."""
    path: Path = tuple(details["loc"])
    if document.is_broken(path):
        return None
    mark, given = document.mark(path), details.get("input")
    if path[2:] == ("template",) and path[0] == "layer_schedule" and details["type"] == FAULT:
        path = path[:2]  # like an unknown name
    elif path[:2] == ("training_hints", "betas") and (isinstance(given, bool) or not isinstance(given, int | float)):
        path = path[:2]
    match details["type"]:
        case kind if kind == FAULT:
            context = details.get("ctx", {})
            return Fault(path, context["what"], context["fix"], mark=mark)
        case "missing":
            key, path = path[-1], path[:-1]
            mark = document.mark(path, key=True)
            return Fault(path, f"the key '{key}' is missing", _missing(path, str(key)), mark=mark)
        case "too_short" if path in document.incomplete:
            return None
        case "too_short" if path in (("layer_templates",), ("layer_schedule",)):
            return Fault(path, "expected at least one layer, got none", "add a layer", mark=mark)
        case "too_short" if path == ("execution_modes",):
            return Fault(
                path, "expected at least one mode, got none", "add {name, max_tokens}, or remove it", mark=mark
            )
        case "too_short" | "too_long":
            wanted = details.get("ctx", {}).get("min_length") or details.get("ctx", {}).get("max_length")
            count = len(given) if isinstance(given, list) else 0
            return Fault(path, f"expected a list of {wanted} values, got {count}", f"write {wanted} values", mark=mark)
        case "list_type":
            return Fault(path, f"expected a list, got {show(given)}", "write a list: [..., ...]", mark=mark)
        case "model_type" | "dict_type" | "model_attributes_type":
            return Fault(
                path, f"expected a mapping, got {show(given)}", "write a mapping: {key: value, ...}", mark=mark
            )
    raise AssertionError(f"pydantic reports {details['type']} at {path}, which has no message here")


def _missing(path: Path, key: str) -> str:
    """The fix for a missing key, with its values if the schema lists them."""
    annotation: Any = Spec
    for step in (*path, key):
        section = next(_sections_in(annotation), None)
        annotation = (section.keys() if section else {}).get(str(step), annotation)
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return f"add `{key}`: {listing(values)}" if values else f"add `{key}`"


def _valid(section: type[S], raw: Any) -> S | None:
    try:
        return section.model_validate(raw)
    except ValidationError:
        return None  # reported already, by the validation of the whole file


def _valid_sections(raw: dict[str, Any]) -> ParsedSections:
    templates = raw.get("layer_templates")
    schedule = raw.get("layer_schedule")
    templates = templates if isinstance(templates, dict) else {}
    schedule = schedule if isinstance(schedule, list) else []
    valid_templates = {name: _valid(Template, value) for name, value in templates.items()}
    valid_entries = {i: _valid(entry_section(value), value) for i, value in enumerate(schedule)}
    modes = raw.get("execution_modes")
    valid_modes = {i: _valid(ExecutionMode, value) for i, value in enumerate(modes if isinstance(modes, list) else [])}
    return ParsedSections(
        model=_valid(Model, raw.get("model")),
        tokenizer=_valid(TokenizerContract, raw.get("tokenizer_contract")),
        embedding=_valid(Embedding, raw.get("embedding")),
        head=_valid(Head, raw.get("head")),
        hints=_valid(TrainingHints, raw.get("training_hints") or {}),
        templates={name: template for name, template in valid_templates.items() if template},
        entries={i: entry for i, entry in valid_entries.items() if entry},
        names=frozenset(templates),
        modes={i: mode for i, mode in valid_modes.items() if mode},
    )
