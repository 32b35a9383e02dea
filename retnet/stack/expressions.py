"""`let` and `${...}`: arithmetic on constants that a file defines, evaluated on Python's syntax tree.

The grammar is numbers, `let.NAME`, + - * / //, signs and parentheses. There are no powers, calls, comparisons, other
names or text, and intermediate results must be finite and fit in 64 bits, so an expression can neither run code nor
run long. A result that is a whole number becomes an integer (64 / 2 is 32), as most values of a stack are integers.
"""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from retnet.system.suggest import nearest

from .document import LARGEST_INTEGER, Document
from .errors import Fault, Mark, Path, listing, plain, show

MAX_LENGTH = 200

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_GRAMMAR = "use numbers, let.NAME, + - * / //, and parentheses"


class ExpressionError(ValueError):
    """An expression that cannot be evaluated. `fix` says what to write instead."""

    def __init__(self, what: str, fix: str = _GRAMMAR) -> None:
        self.fix = fix
        super().__init__(what)


class FaultyConstantError(ExpressionError):
    """An expression with a faulty constant. The fault is reported where the constant is defined."""


_FAULTY = math.nan  # the value of a faulty constant; a file cannot contain NaN


class _AnyName(dict[str, Number]):
    """The constants of a `let` that could not be read: any name may have been defined in it."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Number:
        return _FAULTY


def is_expression(value: object) -> bool:
    """Whether a value is `${...}` from start to end; other text is not an expression."""
    return isinstance(value, str) and value.strip().startswith("${") and value.strip().endswith("}")


def evaluate(expression: str, names: Mapping[str, Number]) -> Number:
    """The value of `${...}`, or of its content. Raises ExpressionError."""
    body = expression.strip().removeprefix("${").removesuffix("}").strip()
    if len(body) > MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(body)} characters", f"write at most {MAX_LENGTH} of them")
    if not body:
        raise ExpressionError("the expression is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about odd literals, which are refused below
            tree = ast.parse(body, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ExpressionError(f"{show(body)} is not an arithmetic expression") from None
    value = _value(tree.body, names)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _value(node: ast.AST, names: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=bool()):
            raise ExpressionError(f"{node.value} is not a number")
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Constant():
            raise ExpressionError(f"{show(str(node.value))} is not a number", f"write it without quotes; {_GRAMMAR}")
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _value(node.left, names), _value(node.right, names)
            try:
                return _bounded(_BINARY[type(node.op)](left, right))
            except ZeroDivisionError:
                raise ExpressionError("division by zero", "divide by a number other than 0") from None
            except OverflowError:
                raise ExpressionError("a result is too large", "use smaller numbers") from None
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _bounded(_UNARY[type(node.op)](_value(node.operand, names)))
        case ast.Attribute(value=ast.Name(id="let"), attr=name):
            if name not in names:
                close = nearest(name, tuple(names))
                known = f"did you mean let.{close}?" if close else f"defined are: {listing(names) or 'none'}"
                raise ExpressionError(f"let.{plain(name)} is not defined", f"define it under `let`; {known}")
            if math.isnan(names[name]):
                raise FaultyConstantError(f"let.{plain(name)} has no value")
            return names[name]
        case ast.Name(id=name):
            raise ExpressionError(
                f"{show(name)} is not known here", f"write let.{plain(name)} and define it under `let`"
            )
    raise ExpressionError("only arithmetic is allowed")


def _bounded(value: Number) -> Number:
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpressionError("a result is not a finite number", "use smaller numbers")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ExpressionError("a result is too large", f"stay below {LARGEST_INTEGER}")
    return value


def resolve(document: Document) -> dict[str, Any]:
    """The document's root without `let`, and with every expression replaced by its value.

    Faults are added to `document.faults`. A faulty expression becomes None, and its path is marked as broken.
    """
    root = dict(document.root)
    names = _constants(root.pop("let"), document) if "let" in root else {}
    return {key: _resolve(value, (key,), names, document) for key, value in root.items()}


def _constants(block: Any, document: Document) -> dict[str, Number]:
    names: dict[str, Number] = {}
    if not isinstance(block, dict):
        if not document.is_broken(("let",)):
            fix = "write `let: {NAME: NUMBER, ...}` or leave it out"
            _report(document, ("let",), f"expected a mapping, got {show(block)}", fix)
        return _AnyName()
    for name, value in block.items():
        path = ("let", name)
        if not name.isidentifier():
            mark = document.mark(path, key=True)
            _report(document, ("let",), f"{show(name)} cannot follow `let.`", "use letters, digits and _", mark)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            names[name] = _FAULTY
            if document.is_broken(path):
                continue
            hint = (
                "write a number here, and the expression where it is used" if is_expression(value) else "write a number"
            )
            _report(document, path, f"expected a number, got {show(value)}", hint)
        else:
            names[name] = value
    return names


def _resolve(value: Any, path: Path, names: Mapping[str, Number], document: Document) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, (*path, key), names, document) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, (*path, i), names, document) for i, item in enumerate(value)]
    if not is_expression(value):
        return value
    try:
        return evaluate(value, names)
    except ExpressionError as error:
        if not isinstance(error, FaultyConstantError):
            _report(document, path, str(error), error.fix)
        document.broken.add(path)
        return None


def _report(document: Document, path: Path, what: str, fix: str, mark: Mark | None = None) -> None:
    document.faults.append(Fault(path, what, fix, mark=mark or document.mark(path), topic="let"))
