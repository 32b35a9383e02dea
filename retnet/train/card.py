"""The model card of a run: README.md beside the model, filled from what the run knows and nothing else.

Licence and language are left out, as no run knows them. A card that a user has edited is kept: removing its first
comment is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from retnet.models.config import ModelConfig
from retnet.models.hf.card import model_card
from retnet.system.files import written_whole
from retnet.train.finish import CURVE_FILE, TrainingSummary
from retnet.train.report.facts import Table

CARD_FILE = "README.md"
MARK = "<!-- Written by retnet train, which replaces this file; remove this line to keep your changes. -->"
_OWN = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token", "run_name", "logging_dir")
_PATHS = ("valid", "chat_template")
_SHOWN = ("Data", "Settings", "Machine", "Software")


def write_card(
    output: Path, config: ModelConfig, summary: TrainingSummary, tables: Mapping[str, Table], repository: str | None
) -> None:
    """Write the card, unless the directory has one that is not ours.

    tables: facts of the run, of `report.facts`. repository: the name on the hub, if there is one.
    """
    file = output / CARD_FILE
    if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return
    has_curve = (output / CURVE_FILE).is_file()
    text = model_card(config, repository or output.name, training=_training(summary, tables, has_curve))
    with written_whole(file) as written:
        written.write(text.encode("utf-8", "backslashreplace"))


def _training(summary: TrainingSummary, tables: Mapping[str, Table], has_curve: bool) -> str:
    results = [
        ("steps", f"{summary.steps:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("time", f"{summary.seconds:,.0f} s, {summary.tokens / summary.seconds:,.0f} tokens/s"),
    ]
    measured = (
        ("validation loss", summary.valid_loss, "nats per token"),
        ("validation perplexity", summary.valid_perplexity, ""),
        ("validation bits per byte", summary.valid_bits_per_byte, ""),
    )
    results += [(name, f"{value:.4f} {unit}".rstrip()) for name, value, unit in measured if value is not None]
    parts = [f"{MARK}\n\n## Training", _markdown(results)]
    parts += [f"![Loss by step]({CURVE_FILE})"] if has_curve else []
    for title in _SHOWN:
        known = [row for row in tables.get(title, []) if not row[1].startswith("unknown") and row[0] not in _OWN]
        if rows := [(_public(name), _public(value) if name in _PATHS else value) for name, value in known]:
            parts.append(f"### {title}\n\n{_markdown(rows)}")
    return "\n\n".join(parts) + "\n"


def _public(name: str) -> str:
    """The name of a source without the folders above it, which are the machine's own."""
    before, colon, path = name.rpartition(": ")
    return f"{before}{colon}{Path(path).name or path}"


def _markdown(rows: Table) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
