"""A table of presets with their sizes, for `retnet info` and `retnet stack presets list`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from retnet.models.config import ModelConfig

CONTEXT = 8192  # tokens; the state of attention grows with them


def preset_table(presets: Iterable[tuple[str, ModelConfig, str]]) -> Group:
    """Per preset (name, configuration, summary) its parameters and the state of one sequence after CONTEXT tokens; the
    summary, if it is not empty, on lines of its own."""
    from retnet.models.cost import model_cost
    from retnet.system.sizes import format_bytes

    rows = [("preset", "parameters", f"state at {CONTEXT:,}", "")]
    for name, config, summary in presets:
        cost = model_cost(config, CONTEXT)
        rows.append((name, f"{cost.parameters:,}", format_bytes(cost.state_bytes, digits=3), summary))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines: list[RenderableType] = []
    for i, (name, parameters, state, summary) in enumerate(rows):
        sizes = f"  {parameters:>{widths[1]}}  {state:>{widths[2]}}"
        lines.append(Text(f"{name:{widths[0]}}", "bold").append(sizes, "bold" if i == 0 else "not bold"))
        if summary:
            lines.append(Padding(Text(summary), (0, 0, 0, 4)))
    return Group(*lines)
