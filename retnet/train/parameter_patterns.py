"""Patterns of parameters' names that choose the algorithm of each: `optimizer_groups` of a recipe or a stack.

    {"muon": ["**.weight"], "adamw": ["embed_tokens.*", "*.router.weight"]}

`*` matches any text, dots included. Names are those of LanguageModel, such as layers.0.mixer.q_proj.weight;
`embed_tokens` and `lm_head` are further names of `embedding` and `head`. A parameter that matches patterns of both goes
to AdamW, and one that matches none goes where it goes without patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

Algorithm = Literal["muon", "adamw"]
Patterns = Mapping[Algorithm, Sequence[str]]

PREFIX = "model."  # of the names in a model with transformers' interface
_ALSO_CALLED = {"embedding": "embed_tokens", "head": "lm_head"}


def algorithm_of(name: str, patterns: Patterns | None) -> Algorithm | None:
    """ "muon" or "adamw" for the parameter of that name; None if no pattern matches."""
    algorithms: tuple[Algorithm, ...] = ("adamw", "muon")
    for algorithm in algorithms:
        if any(_matches(name, pattern) for pattern in (patterns or {}).get(algorithm, ())):
            return algorithm
    return None


def without_a_match(names: Iterable[str], patterns: Patterns | None) -> list[str]:
    """The patterns that match none of the names."""
    names = list(names)
    every = dict.fromkeys(pattern for group in (patterns or {}).values() for pattern in group)
    return [pattern for pattern in every if not any(_matches(name, pattern) for name in names)]


def _matches(name: str, pattern: str) -> bool:
    name = name.removeprefix(PREFIX)
    first, dot, rest = name.partition(".")
    return fnmatchcase(name, pattern) or fnmatchcase(_ALSO_CALLED.get(first, first) + dot + rest, pattern)
