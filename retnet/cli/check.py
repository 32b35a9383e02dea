"""`retnet check`: whether the forms of retention agree, as a table and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from retnet.cli._common import console, errors, load_shown, print_json
from retnet.cli._options import AsJson, Device
from retnet.system.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from retnet.eval.agreement import Agreement

OPERATOR = "operator"
_SHAPE = (2, 512, 4, 64, 128)  # B, T, H, K, V of the operator's random inputs


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|operator", help="Preset, stack file, saved directory, or 'operator'.")
    ],
    text: Annotated[Path | None, typer.Option(help="File of text to run on; random tokens by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of input; of --text, the first ones.")] = _SHAPE[1],
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, float16, bfloat16; may be repeated.")
    ] = None,
    chunk_size: Annotated[list[int] | None, typer.Option(help="Chunk sizes to try; may be repeated.")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of random inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare every form with a float64 reference: parallel, recurrent, chunkwise, and prefill followed by decode.

    Exits with 1 if any row fails.

    Example: retnet check retnet-tiny --length 128
    """
    import torch

    from retnet.eval.agreement import CHUNK_SIZES, check_model, check_operator

    dtypes = dtype or ["float64", "float32", "bfloat16"]
    sizes = chunk_size or list(CHUNK_SIZES)
    if model == OPERATOR:
        from retnet.ops.device import resolve_device

        if text is not None:
            raise ValueError(
                "--text is given for the operator, which runs on random tensors; accepted with --text: a model"
            )
        shape = (_SHAPE[0], length, *_SHAPE[2:])
        rows = _shown(check_operator(shape, dtypes, sizes, device=resolve_device(device), seed=seed))
        title = f"retention, B, T, H, K, V = {', '.join(map(str, shape))}"
    else:
        ids = None if text is None else _ids_of(text, model, length)  # refused before the weights are loaded
        network = load_shown(model, device)
        if ids is None:
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(network.config.vocab_size, (1, length), generator=generator)
        ids = ids.to(network.embedding.weight.device)
        rows = _shown(check_model(network, ids, dtypes, sizes))
        title = f"{model}, {ids.shape[1]} tokens of {text or 'random input'}"
    failed = sum(not row.passed for row in rows)
    if as_json:
        print_json([_as_dict(row) for row in rows])
    else:
        console.print(_table(escape(title), rows))
        for line in _legend(rows):
            console.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)
        console.print(f"[bold red]{failed} of {len(rows)} fail[/]" if failed else f"[green]all {len(rows)} agree[/]")
    raise typer.Exit(code=1 if failed else 0)


def _shown(rows: Iterator[Agreement]) -> list[Agreement]:
    """The rows, with the progress of their computation."""
    done = []
    with Progress(errors, "comparing", unit="ways") as shown:
        for row in rows:
            done.append(row)
            shown.update(len(done), notes=[f"{row.way}, {row.dtype}"])
    return done


def _ids_of(text: Path, model: str, length: int) -> Tensor:
    """The first tokens of a text, in the tokens of a model."""
    import torch

    from retnet.api import load_tokenizer

    ids = load_tokenizer(model).encode(text.read_bytes(), start=True)
    if len(ids) < 2:
        raise ValueError(f"{text} is empty; accepted: a file with text")
    return torch.tensor([ids[:length]])


def _table(title: str, rows: list[Agreement]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("way", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    predicts = any(row.changed is not None for row in rows)
    for name in ("max", "relative", "limit", "", *(["differs"] if predicts else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        changed = [f"{row.changed:,}/{row.tokens:,}"] if predicts else []
        verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        numbers = (f"{x:.1e}" for x in (row.max_difference, row.relative, row.limit))
        table.add_row(row.way, row.dtype, *numbers, verdict, *changed)
    return table


def _legend(rows: list[Agreement]) -> Iterator[str]:
    """The columns in words."""
    yield "max: largest error; relative: norm of the error / norm of the float64 result, which the limit bounds:"
    if rows[0].tokens is None:
        yield "the rounding of another order of summation in that dtype"
        return
    yield "for parallel what rounding in that dtype may cost, for every other way twice parallel's error"
    yield (
        "differs: positions whose likeliest token is not float64's, as rounding decides between near-equal "
        "ones; reported, not judged"
    )


def _as_dict(row: Agreement) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(row) | {"passed": row.passed}
