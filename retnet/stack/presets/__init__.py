"""The stack presets: one YAML file each, whose first comment is its summary.

Each architecture also has a preset `<name>_mini`, which uses the byte tokenizer and trains on a CPU.
"""

from functools import cache
from importlib import resources

from retnet.system.suggest import did_you_mean

from ..load import Stack, parse_stack


@cache
def preset_names() -> tuple[str, ...]:
    """The names of all presets, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(file.name.removesuffix(".yml") for file in files if file.name.endswith(".yml")))


def preset_text(name: str) -> str:
    """The text of a preset. Raises ValueError, with the nearest name, for an unknown one."""
    if name not in preset_names():
        meant = did_you_mean(name, preset_names())
        raise ValueError(f"no stack preset is named {name!r}{meant} (`retnet stack presets list` shows all)")
    return (resources.files(__name__) / f"{name}.yml").read_text(encoding="utf-8")


def preset_summary(name: str) -> str:
    """The comment at the start of a preset's file, on one line."""
    lines = preset_text(name).splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in opening)


def load_preset(name: str) -> Stack:
    """The stack of a preset. Raises ValueError for an unknown name."""
    return parse_stack(preset_text(name), f"{name}.yml")
