"""A table of presets with their sizes, for `retnet info` and `retnet stack presets list`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from retnet.models.config import ModelConfig

CONTEXT = 8192  # tokens; the state of attention grows with them


def preset_table(presets: Iterable[tuple[str, ModelConfig, str]]) -> Table:
    """One row per preset (name, configuration, summary): parameters, and the state of one sequence after CONTEXT."""
    from retnet.models.cost import model_cost
    from retnet.system.sizes import format_bytes

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("preset", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column(f"state at {CONTEXT:,}", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, config, summary in presets:
        cost = model_cost(config, CONTEXT)
        table.add_row(
            Text(name, "bold"), f"{cost.parameters:,}", format_bytes(cost.state_bytes, digits=3), Text(summary)
        )
    return table
