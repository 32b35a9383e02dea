"""The stacks that come with the package: one YAML file each, its first comment saying what it is.

Every architecture also exists as `<name>_mini`, which reads bytes and trains on a CPU.
"""

import difflib
from functools import cache
from importlib import resources

from ..load import Stack, parse_stack


@cache
def preset_names() -> tuple[str, ...]:
    """All names, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yml") for file in files if file.name.endswith(".yml")))


def preset_text(name: str) -> str:
    """A preset's file. Raises ValueError naming the nearest presets."""
    if name not in preset_names():
        near = difflib.get_close_matches(name, preset_names(), n=3) or preset_names()
        raise ValueError(f"no stack preset is named {name!r}; accepted: {', '.join(near)}")
    return (resources.files(__name__) / f"{name}.yml").read_text(encoding="utf-8")


def preset_summary(name: str) -> str:
    """What a preset is: the comment that opens its file, on one line."""
    lines = preset_text(name).splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in opening)


def load_preset(name: str) -> Stack:
    """A preset's stack. Raises ValueError if there is none of that name."""
    return parse_stack(preset_text(name), f"{name}.yml")
