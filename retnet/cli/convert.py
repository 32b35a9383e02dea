"""`retnet convert`: models from other libraries to ours, and ours to flash-linear-attention's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet.cli._common import console, errors
from retnet.system.progress import BYTES, Progress


def convert(
    source: Annotated[Path, typer.Argument(help="A model directory, or a file of weights.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, new or empty.")],
    to: Annotated[str, typer.Option(help="Format to write: retnet or fla.")] = "retnet",
    format: Annotated[str | None, typer.Option(help="Format of SOURCE; recognised by default.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with the source's own configuration, if SOURCE has none.")
    ] = None,
) -> None:
    """Convert a model from torchscale, flash-linear-attention (fla), syncdoth and others, or ours to fla.

    Weights stream through memory one shard at a time, logits stay the same up to rounding, and tokenizer files are
    copied.

    Example: retnet convert downloads/retnet-1.3B-100B my-model
    """
    from retnet.models.convert import convert as run
    from retnet.models.cost import parameter_counts

    with Progress(errors, "converting", unit=BYTES) as shown:

        def on_bytes(done: int, total: int) -> None:
            shown.update(done, total=total)

        model = run(source, out, to=to, format=format, config=config, on_bytes=on_bytes)
    total = parameter_counts(model)["total"]
    console.print(
        f"{model.name}: {len(model.layers)} layers of width {model.d_model:,}, {total:,} parameters in "
        f"{model.dtype}; written to {out} as {to}",
        markup=False,
        soft_wrap=True,
    )
