"""`retnet tune`: measure and store the best block shapes of the GPU kernels on this device."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from retnet.cli._common import console
from retnet.system.suggest import choices

DTYPES = ("bfloat16", "float16", "float32")


def tune(
    model: Annotated[str | None, typer.Argument(help="Model whose head sizes are tuned; or give --heads.")] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="Key and value dim per head as KxV, such as 256x512; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=10, help="Time of the search, for each head size.")] = 50.0,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure every tile, without a limit of time.")
    ] = False,
) -> None:
    """Measure block shapes of the GPU kernels on this device and store the best in the cache folder.

    A model of the GPU says which shapes to measure first, and all processors compile. Shapes that are no faster than
    those in use replace nothing. The file is read by later calls; deleting it restores the defaults.

    Example: retnet tune --heads 256x512
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; {choices(dtype, DTYPES)}")
    sizes = [_size(text) for text in heads or []] + (_sizes_of(model) if model else [])
    if not sizes:
        raise ValueError("nothing to tune; accepted: a model with retention layers, or --heads KxV")
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device here; accepted: the device that will run the kernels, as block shapes are tuned for it"
        )
    from retnet.kernels.retention.tiles import cache_file
    from retnet.kernels.retention.tune import tune as measure

    for key_dim, value_dim in dict.fromkeys(sizes):
        console.print(f"[bold]{key_dim} x {value_dim}[/], {dtype}")
        limit = None if exhaustive else seconds
        found = measure(key_dim, value_dim, getattr(torch, dtype), seconds=limit, report=console.print)
        before = (
            "refused by the device" if math.isinf(found.before_milliseconds) else f"{found.before_milliseconds:.3f} ms"
        )
        console.print(f"  in use before: {found.before}, {before} forward and backward")
        console.print(f"  best: {found.tiles}, {found.milliseconds:.3f} ms")
        console.print(f"  {found.measured} tiles measured in {found.seconds:.0f} s")
    console.print(f"stored in {cache_file()}")


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"heads is {text!r}; accepted: KxV with positive integers, such as 256x512")
    return int(parts[0]), int(parts[1])


def _sizes_of(model: str) -> list[tuple[int, int]]:
    from retnet.layers.retention import RetentionConfig
    from retnet.stack.resolve import resolve_config

    mixers = (layer.mixer for layer in resolve_config(model).layers)
    return [(m.head_key_dim, m.head_value_dim) for m in mixers if isinstance(m, RetentionConfig)]
