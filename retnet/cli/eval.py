"""`retnet eval`: bits per byte of a text under a model, beside compressors."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from retnet.cli._common import console, write_json


class Part(StrEnum):
    """Which side of the split is scored."""

    valid = "valid"
    all = "all"


def evaluate(
    model: Annotated[str, typer.Argument(help="Preset, stack file or saved directory.")],
    data: Annotated[str, typer.Option(help="File or folder of text, or 'stdlib'.")],
    part: Annotated[Part, typer.Option(help="The held-out documents, or all of them.")] = Part.valid,
    valid_fraction: Annotated[float, typer.Option(help="Share held out, as in training.")] = 0.05,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bits per byte, each document in one context, beside gzip -9, xz -9 and an order-2 byte model.

    The order-2 model is trained on the training documents, so it is shown for the held-out part alone.
    """
    from retnet.data import find_documents, split_documents
    from retnet.eval.bits import bits_per_byte
    from retnet.eval.compressors import compressor_table
    from retnet.stack.resolve import resolve_model

    network = resolve_model(model, device=device)
    documents = find_documents(data)
    split = split_documents(documents, valid_fraction) if part is Part.valid else None
    scored = split.valid if split else documents
    began = time.perf_counter()
    result = bits_per_byte(network, scored)
    seconds = time.perf_counter() - began
    rows = compressor_table(split.train if split else None, scored) | {model: result.bits_per_byte}
    if as_json:
        write_json({"documents": len(scored), "bytes": result.num_bytes, "seconds": seconds, "bits_per_byte": rows})
        return
    size = f"{len(scored)} documents, {result.num_bytes / 1e6:.2f} MB"
    console.print(f"{data}: {size} ({part.value})", highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    table.add_column("bits per byte", justify="right")
    for name, bits in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(*(f"[bold]{cell}[/]" if name == model else cell for cell in (name, f"{bits:.3f}")))
    console.print(table)
    console.print(f"[dim]scored {result.num_bytes / seconds:,.0f} bytes/s[/]")
