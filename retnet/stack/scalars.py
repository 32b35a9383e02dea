"""The types of the values in a stack file, with their error messages.

Each type is a Python type with a validator in front of it, so that the declaration of a key is complete and pydantic
only collects the faults. Values are never converted: text is not a number, 1 is not true, 64.0 is not an integer. The
fix in an error message is the nearest accepted value.
"""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, PlainValidator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from retnet.system.suggest import nearest

from .document import LARGEST_INTEGER
from .errors import listing, show

LARGEST = 2**31 - 1
MOST_STEPS = 99  # of the iteration of an optimizer
FAULT = "stack_fault"  # pydantic's error type for faults raised here; the context holds `what` and `fix`


def refusal(what: str, fix: str) -> PydanticCustomError:
    """The error of a value, for validators of the schema: what is wrong, and what to write instead."""
    # As a parameter, so that braces in the user's text are not read as pydantic's template.
    return PydanticCustomError(FAULT, "{what}", {"what": what, "fix": fix})


def _numeric_text(value: object) -> float | None:
    """The number that text such as '64', '3e-4' or '1_000' means; None for other text."""
    if not isinstance(value, str):
        return None
    try:
        number = float(value.strip())
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_EXPONENT_FORM = re.compile(r"([-+]?\d+)(\.\d+)?[eE]([-+]?)(\d+)")


def _yaml_float(text: str) -> str:
    """A float in the form that YAML 1.1 reads: with a point, and with a sign in the exponent."""
    match = _EXPONENT_FORM.fullmatch(text.strip())
    if match:
        whole, part, sign, exponent = match.groups()
        return f"{whole}{part or '.0'}e{sign or '+'}{exponent}"
    return repr(float(text))


def _text_hint(value: object) -> str:
    if isinstance(value, str) and "${" in value:
        return "; an expression is `${...}` from start to end, with no text around it"
    return ""


def _integer(low: int, high: int = LARGEST, *, nullable: bool = False) -> Callable[[Any], Any]:
    wanted = {0: "an integer of at least 0", 1: "a positive integer"}[low]
    other = ", or null" if nullable else ""

    def check(value: Any) -> Any:
        if nullable and value is None:
            return None
        meant = int(value) if isinstance(value, bool) else _numeric_text(value)
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else meant
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        if number is None:
            raise refusal(f"expected {wanted}{other}, got {show(value)}", f"write {wanted}{other}{_text_hint(value)}")
        close = int(min(max(math.floor(number + 0.5), low), high))
        if number > high:
            raise refusal(f"expected an integer of at most {high}, got {show(value)}", f"write {close} or less")
        hint = ", without quotes" if isinstance(value, str) else ""
        kind = " (text)" if isinstance(value, str) else ""
        raise refusal(f"expected {wanted}{other}, got {show(value)}{kind}", f"write {close}{hint}")

    return check


def _number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    nullable: bool = False,
) -> Callable[[Any], Any]:
    if low == -math.inf:
        wanted = "a number"
    elif high == math.inf:
        wanted = f"a number {'above' if low_open else 'of at least'} {low:g}"
    else:
        wanted = f"a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    wanted += ", or null" if nullable else ""

    def check(value: Any) -> Any:
        if nullable and value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            above = value > low if low_open else value >= low
            below = value < high if high_open else value <= high
            if above and below and math.isfinite(value):
                return float(value)
        meant = _numeric_text(value)
        if isinstance(value, str) and meant is not None:
            raise refusal(
                f"expected {wanted}, got the text {show(value)}",
                f"write {_yaml_float(value)} (a point, a signed exponent, no quotes)",
            )
        raise refusal(f"expected {wanted}, got {show(value)}", f"write {wanted}{_text_hint(value)}")

    return check


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    meant = {"true": "true", "yes": "true", "on": "true", "1": "true", "false": "false", "no": "false", "off": "false"}
    close = meant.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    raise refusal(f"expected true or false, got {show(value)}", f"write {close or 'true or false'}, without quotes")


def _text(*, nullable: bool = False) -> Callable[[Any], Any]:
    wanted = "text, or null" if nullable else "text"

    def check(value: Any) -> Any:
        if (isinstance(value, str) and value.strip()) or (nullable and value is None):
            return value
        if value is None or isinstance(value, dict | list | str):
            raise refusal(f"expected {wanted}, got {show(value) if value != '' else 'empty text'}", f"write {wanted}")
        raise refusal(f"expected {wanted}, got {show(value)}", f"put it in quotes: '{show(value)}'")

    return check


class OneOf:
    """Annotates a Literal: the error lists the accepted values and names the nearest."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        accepted = tuple(value for value in get_args(source) if value is not None)  # None: the key is absent

        def check(value: Any) -> Any:
            if isinstance(value, str) and value in accepted:
                return value
            close = nearest(value, accepted)
            options = f"one of: {listing(accepted)}" if len(accepted) > 1 else listing(accepted)
            guess = f"did you mean {close}? " if close else ""
            raise refusal(f"unknown value {show(value)}", f"{guess}write {options}")

        return core_schema.no_info_before_validator_function(check, handler(source))


ONE_OF = OneOf()

_INIT = re.compile(r"normal_(\d+(\.\d+)?([eE][-+]?\d+)?)")


def init_std(name: str) -> float | None:
    """The standard deviation of `normal_<std>`, None for the named initialisations."""
    match = _INIT.fullmatch(name)
    return float(match[1]) if match else None


def _initialisation(value: Any) -> str:
    if value in ("paper", "torchscale") if isinstance(value, str) else False:
        return value
    std = init_std(value) if isinstance(value, str) else None
    if std is None or not 0 < std < math.inf:
        raise refusal(f"unknown initialisation {show(value)}", "write normal_<std> (normal_0.02), paper, or torchscale")
    return value


DECAYS = ("paper", "experiment", "alibi", "none", "gated")


def _decay(value: Any) -> str | float | tuple[float, ...]:
    """The name of a schedule, one gamma for all heads, or a list of one gamma per head."""
    gammas = value if isinstance(value, list) else [value]
    if gammas and all(isinstance(g, int | float) and not isinstance(g, bool) and 0 <= g <= 1 for g in gammas):
        return tuple(float(g) for g in gammas) if isinstance(value, list) else float(value)
    if isinstance(value, str) and value in DECAYS:
        return value
    close = nearest(value, DECAYS)
    guess = f"did you mean {close}? " if close else ""
    raise refusal(
        f"expected a decay schedule or gammas in [0, 1], got {show(value)}",
        f"{guess}write one of: {listing(DECAYS)}; or a number; or a list of one number per head",
    )


def _schema_version(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value == 1:
        return value
    raise refusal(f"schema_version {show(value)} is not supported", "write schema_version: 1 (the integer)")


PositiveInt = Annotated[int, BeforeValidator(_integer(1))]
Count = Annotated[int, BeforeValidator(_integer(0))]
Steps = Annotated[int, BeforeValidator(_integer(1, MOST_STEPS))]
StepsOrNone = Annotated[int, BeforeValidator(_integer(0, MOST_STEPS))]
Coefficients = Annotated[list[Annotated[float, BeforeValidator(_number())]], Field(min_length=3, max_length=3)]
# `Maybe...`: the key may be absent (None), but not null. `...OrNull`: null is accepted.
MaybePositiveInt = Annotated[int | None, BeforeValidator(_integer(1))]
MaybeProbability = Annotated[float | None, BeforeValidator(_number(0, 1, high_open=True))]
MaybePositive = Annotated[float | None, BeforeValidator(_number(0, low_open=True))]
MaybeNonNegative = Annotated[float | None, BeforeValidator(_number(0))]
ModuleCount = Annotated[int, BeforeValidator(_integer(1, 64))]
StreamCount = Annotated[int, BeforeValidator(_integer(1, 64))]
Iterations = Annotated[int, BeforeValidator(_integer(0, 1000))]
PositiveIntOrNull = Annotated[int | None, BeforeValidator(_integer(1, nullable=True))]
ParameterCount = Annotated[int | None, BeforeValidator(_integer(1, 2**62, nullable=True))]
Seed = Annotated[int, BeforeValidator(_integer(0, LARGEST_INTEGER))]
Positive = Annotated[float, BeforeValidator(_number(0, low_open=True))]
PositiveOrNull = Annotated[float | None, BeforeValidator(_number(0, low_open=True, nullable=True))]
NonNegative = Annotated[float, BeforeValidator(_number(0))]
Fraction = Annotated[float, BeforeValidator(_number(0, 1))]
Probability = Annotated[float, BeforeValidator(_number(0, 1, high_open=True))]
Flag = Annotated[bool, BeforeValidator(_flag)]
Text = Annotated[str, BeforeValidator(_text())]
TextOrNull = Annotated[str | None, BeforeValidator(_text(nullable=True))]
Initialisation = Annotated[str, BeforeValidator(_initialisation)]
Decay = Annotated[str | float | tuple[float, ...], PlainValidator(_decay)]
SchemaVersion = Annotated[int, BeforeValidator(_schema_version)]
