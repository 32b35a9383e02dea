"""The rules of muP in a model, for `retnet info` and `retnet stack explain`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from retnet.cli._common import console

if TYPE_CHECKING:
    from retnet.models.config import ModelConfig


def mup_rules(config: ModelConfig) -> dict[str, Any] | None:
    """The base width and, per kind of weight, its parameters and factors, as plain data; None without muP."""
    import torch

    from retnet.models.lm import LanguageModel
    from retnet.models.mup import summarize, width_ratio

    if config.mup_base_width is None:
        return None
    with torch.device("meta"):
        model = LanguageModel(config)
    kinds = [asdict(kind) for kind in summarize(model, config)]
    return {"base_width": config.mup_base_width, "width_ratio": width_ratio(config), "kinds": kinds}


def print_mup(rules: dict[str, Any] | None) -> None:
    """Print `mup_rules`, if there are any."""
    if rules is None:
        return
    console.print(
        f"muP: {rules['width_ratio']:g} times the base width {rules['base_width']:,}; factors of initial weights, and "
        "of learning rates (weight decay is divided by them):",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("weights", "parameters", "initial", "AdamW", "Muon"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for kind in rules["kinds"]:
        factors = (f"{kind[name]:.3g}" for name in ("init", "adamw", "muon"))
        table.add_row(kind["growth"], f"{kind['parameters']:,}", *factors)
    console.print(table)
