"""Sandbox for Jinja chat templates, with the names that transformers gives them, in bounded time and size.

Loops and calls look at the clock, and the text is measured as it is written. Results of `*` and `**` are bounded too.
Other operators of a template can take memory that nothing here bounds: a template is part of a model, and a model is
chosen by whoever starts the server.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 26
BEGIN, END = "\ud804", "\ud805"  # of generation blocks: halves of surrogate pairs, which no text has
MARKS_GENERATION = "_marks_generation"
_DEADLINE = "_deadline"
_BOUNDED = "_bounded"
_NOT_ASCII = re.compile("[^\n -~\ud800-\udfff]")


class TemplateError(ValueError):
    """The template is not valid, refuses its input, or exceeds its bounds."""


@lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """A template, ready to be rendered. Raises TemplateError if it is not Jinja."""
    try:
        return _Sandbox().from_string(source)
    except Exception as error:  # syntax errors, and whatever a compiler stumbles over: deep nesting, huge constants
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a template. Variables must be JSON: their methods can be called by the template.

    Raises TemplateError.
    """
    template = compiled(source)
    pieces, length = [], 0
    deadline = time.monotonic() + MAX_SECONDS
    try:
        for piece in template.generate({**variables, _DEADLINE: deadline}):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise TemplateError(f"the chat template writes more than {MAX_CHARACTERS:,} characters")
            _look_at_clock(deadline)
    except TemplateError:
        raise
    except jinja2.TemplateError as error:  # the template's own `raise_exception`, and undefined names
        raise TemplateError(f"the chat template refuses the conversation: {str(error)[:500]}") from error
    except Exception as error:  # a template is a program, and may raise whatever Python raises
        text = f"{type(error).__name__}: {error}"
        raise TemplateError(f"the chat template cannot write this conversation ({text[:500]})") from error
    return "".join(pieces)


def _look_at_clock(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TemplateError(f"the chat template takes more than {MAX_SECONDS:g} s")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`: what the assistant writes, between marks if they are asked for."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark_if_asked(BEGIN, line), jinja2.nodes.Scope(body, lineno=line), _mark_if_asked(END, line)]


def _mark_if_asked(mark: str, line: int) -> jinja2.nodes.Node:
    output = jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line)
    return jinja2.nodes.If(jinja2.nodes.Name(MARKS_GENERATION, "load"), [output], [], [], lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **given: Any) -> None:
        self, *rest = args  # so that a template may set a `self`
        names = dict(*rest, **given)
        for name in names:
            _check_public(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}; accepted: no underscore in front")


class _Dict:
    """`dict` for templates: what it makes, and none of its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Sandbox(ImmutableSandboxedEnvironment):
    """An environment of one template."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters[_BOUNDED] = _bounded
        own = {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
        self.globals.update(own)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, _BOUNDED, [], [], None, None, lineno=loop.lineno)
        return tree.set_environment(self)  # type: ignore[return-value] (the tree itself)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _look_at_clock(context[_DEADLINE])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            within = all(isinstance(x, (int, float)) and abs(x) <= 1024 for x in (left, right))
        else:
            sizes = [len(x) if isinstance(x, (str, list, tuple)) else x for x in (left, right)]
            within = sizes == [left, right] or sizes[0] * sizes[1] <= MAX_CHARACTERS
        if not within:
            raise jinja2.exceptions.SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _bounded(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, as long as there is time."""
    deadline = context[_DEADLINE]
    for item in items:
        _look_at_clock(deadline)
        yield item


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML's escapes. Halves of surrogate pairs, which mark contents, stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text
