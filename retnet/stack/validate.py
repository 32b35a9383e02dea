"""A document to a `Spec`: which keys may stand where, what each may hold, every fault collected.

Two passes. The first compares keys with the schema: unknown keys, keys that are known but not supported, reserved
prefixes. What remains goes to pydantic, which collects what is missing and what has a wrong value. Rules across
sections then run on every section that is valid by itself, so that a fault in one does not hide another's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .document import Document
from .errors import Category, Fault, Mark, Path, listing, nearest, plain, show
from .mixers import MIXERS
from .scalars import FAULT
from .schema import Embedding, Entry, Head, Model, Spec, State, Template, TokenizerContract, TrainingHints
from .section import OURS, RESERVED_PREFIXES, Section
from .unsupported import ENTRY_KINDS, STATE_KEYS, Unsupported

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class ReservedKey:
    """A key under a reserved prefix: it does nothing, and the report says so."""

    path: Path
    mark: Mark | None


@dataclass(frozen=True)
class ParsedSections:
    """The sections that are valid by themselves; None, or absent, where one is not."""

    model: Model | None
    tokenizer: TokenizerContract | None
    embedding: Embedding | None
    head: Head | None
    hints: TrainingHints | None
    templates: dict[str, Template]
    entries: dict[int, Entry]
    names: frozenset[str]  # of all templates the file defines, valid or not


@dataclass
class Checked:
    """What checking a document found. There is no spec if there is a fault."""

    spec: Spec | None
    parts: ParsedSections
    problems: list[Fault]
    reserved: list[ReservedKey]


def check_sections(document: Document, root: dict[str, Any]) -> Checked:
    """Check every section of a document by itself. `root` is its value with all expressions replaced."""
    pruner = _Pruner(document)
    pruned = pruner.prune(Spec, root, ())
    spec = None
    try:
        spec = Spec.model_validate(pruned)
    except ValidationError as error:
        found = (_problem(details, document) for details in error.errors(include_url=False))
        pruner.problems += [problem for problem in found if problem]
    return Checked(spec, _parts(pruned), pruner.problems, pruner.reserved)


class _Pruner:
    """Strips what pydantic should not see, and reports it."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Fault] = []
        self.reserved: list[ReservedKey] = []

    def prune(self, section: type[Section], raw: Any, path: Path) -> Any:
        """`raw` with the section's own keys alone."""
        if not isinstance(raw, dict):
            return raw
        if section is Entry:
            kind = next((key for key in ENTRY_KINDS if key in raw), None)
            if kind:
                self._refuse(path, kind, ENTRY_KINDS[kind], self.document.mark((*path, kind), key=True))
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
                self._unknown(key, known, path)
        return kept

    def _descend(self, annotation: Any, value: Any, path: Path) -> Any:
        section = next(_sections_in(annotation), None)
        if section is None:
            return value
        if get_origin(annotation) is dict and isinstance(value, dict):
            return {key: self.prune(section, item, (*path, key)) for key, item in value.items()}
        if get_origin(annotation) is list and isinstance(value, list):
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
            self.problems.append(Fault(path, f"a {kind} mixer has no {key}", fix, Category.COMPATIBILITY, mark))
        return {**template, "state": {key: value for key, value in state.items() if key not in foreign}}

    def _refuse(self, path: Path, key: str, refused: Unsupported, mark: Mark | None) -> None:
        what = f"`{key}` ({refused.what}) is not supported here"
        self.problems.append(Fault(path, what, refused.instead, Category.UNSUPPORTED, mark))

    def _unknown(self, key: str, known: dict[str, Any], path: Path) -> None:
        ours = key.startswith(OURS)
        names = [name for name in known if name.startswith(OURS) == ours] + ["let"] * (not path)
        close = nearest(key, tuple(names))
        guess = f"did you mean {close}? " if close else "remove it; "
        fix = f"{guess}keys known here: {listing(names) or f'none under {OURS}*'}"
        mark = self.document.mark((*path, key), key=True)
        self.problems.append(Fault(path, f"unknown key '{plain(key)}'", fix, mark=mark))


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The section inside an annotation such as `Norm | None` or `dict[str, Template]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _problem(details: ErrorDetails, document: Document) -> Fault | None:
    """Our words for what pydantic found; None for the consequence of a fault already reported."""
    path: Path = tuple(details["loc"])
    if document.is_broken(path):
        return None
    mark, given = document.mark(path), details.get("input")
    if path[2:] == ("template",) and path[0] == "layer_schedule" and details["type"] == FAULT:
        path = path[:2]  # as for a name that there is not
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
            return Fault(path, "at least one is needed, got none", "add a layer", mark=mark)
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
    raise AssertionError(f"pydantic reports {details['type']} at {path}, which has no words here")


def _missing(path: Path, key: str) -> str:
    """How to add a missing key: with the values it takes, if they are few."""
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
        return None  # reported already, with the whole file


def _parts(raw: dict[str, Any]) -> ParsedSections:
    templates = raw.get("layer_templates")
    schedule = raw.get("layer_schedule")
    templates = templates if isinstance(templates, dict) else {}
    schedule = schedule if isinstance(schedule, list) else []
    valid_templates = {name: _valid(Template, value) for name, value in templates.items()}
    valid_entries = {i: _valid(Entry, value) for i, value in enumerate(schedule)}
    hints = raw.get("training_hints")
    return ParsedSections(
        model=_valid(Model, raw.get("model")),
        tokenizer=_valid(TokenizerContract, raw.get("tokenizer_contract")),
        embedding=_valid(Embedding, raw.get("embedding")),
        head=_valid(Head, raw.get("head")),
        hints=_valid(TrainingHints, {} if hints is None else hints),
        templates={name: template for name, template in valid_templates.items() if template},
        entries={i: entry for i, entry in valid_entries.items() if entry},
        names=frozenset(templates),
    )
