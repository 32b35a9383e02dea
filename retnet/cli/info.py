"""`retnet info`: parameters, operations and state of a model, compared with a Transformer of its width and depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from retnet.cli._common import console, print_json
from retnet.cli._mup import mup_rules, print_mup
from retnet.cli._options import MODEL_HELP, AsJson, Force
from retnet.system.extras import require
from retnet.system.outputs import check_new_file
from retnet.system.sizes import format_bytes, spans

if TYPE_CHECKING:
    from retnet.models.config import ModelConfig

_CONTEXTS = (512, 2048, 8192, 32768, 131072, 1048576)


def info(
    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} Without: the presets with their sizes.")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Context lengths; may be repeated.")] = None,
    as_json: AsJson = False,
    png: Annotated[Path | None, typer.Option(help="Plot state size, windows and decay masks into this file.")] = None,
    force: Force = False,
) -> None:
    """Show parameters, operations per token, state and KV cache by context length, and each head's window.

    Without MODEL, the presets with their sizes.

    Example: retnet info retnet-1.3b --context 131072
    """
    if model is None:
        if context or as_json or png is not None:
            raise ValueError("no model; accepted: retnet info MODEL with these options, or retnet info alone")
        _list_presets()
        return
    if png is not None:
        require("plots", "--png")
        check_new_file(png, force=force)

    from retnet.stack.resolve import model_label, resolve_config

    config = resolve_config(model)
    longest = min(layer.mixer.longest_context for layer in config.layers)
    contexts = tuple(context or sorted({int(min(c, longest)) for c in _CONTEXTS}))
    summary = _summary(config, contexts)
    if png is not None:
        from retnet.eval.figures import save_model_figure

        save_model_figure(config, contexts, png, model_label(model))
    if as_json:
        print_json(summary)
    else:
        _print(model, summary)


def _list_presets() -> None:
    from retnet.cli._presets import preset_table
    from retnet.models.presets import PRESETS

    console.print(preset_table((name, make(), "") for name, make in PRESETS.items()))
    console.print(
        "[dim]state per sequence; each also under muP, as NAME-mup; more presets, of hybrids in YAML: retnet stack "
        "presets list[/]",
        highlight=False,
        soft_wrap=True,
    )


def _summary(config: ModelConfig, contexts: tuple[int, ...]) -> dict[str, object]:
    from retnet.layers.recompute import LEVELS
    from retnet.models.activations import activation_bytes, working_bytes
    from retnet.models.cost import (
        device_notes,
        head_windows,
        model_cost,
        parameter_counts,
        residual_streams,
        retention_layers,
        transformer_cache_bytes,
    )
    from retnet.ops.device import resolve_device

    device = resolve_device("auto").type
    costs = [(context, model_cost(config, context, device)) for context in contexts]
    return {
        "name": config.name,
        "layers": len(config.layers),
        "width": config.d_model,
        "vocabulary": config.vocab_size,
        "residual_streams": max(map(residual_streams, config.layers)),
        "parameters": parameter_counts(config),
        "contexts": [
            {
                "tokens": context,
                "training_flops_per_token": cost.training_flops,
                "decode_flops_per_token": cost.decode_flops,
                "state_bytes": cost.state_bytes,
                "transformer_cache_bytes": transformer_cache_bytes(config, context),
            }
            for context, cost in costs
        ],
        "activation_bytes_per_token": {level: round(activation_bytes(config, level)) for level in LEVELS},
        "working_bytes_per_token": round(working_bytes(config)),
        # JSON has no infinity: a head without decay has no window.
        "on_this_device": device_notes(config, max(contexts), device),
        "window_layers": retention_layers(config),
        "mup": mup_rules(config),
        "windows": [[None if w == float("inf") else w for w in layer] for layer in head_windows(config)],
    }


def _print(model: str, summary: dict) -> None:
    parts = summary["parameters"]
    console.print(
        f"[bold]{escape(model)}[/]: {summary['layers']} layers of width {summary['width']:,}, vocabulary "
        f"{summary['vocabulary']:,}, [bold]{parts['total']:,}[/] parameters ({parts['layers']:,} in layers, "
        f"{parts['embedding']:,} embedding, {parts['head']:,} head"
        + (f", {parts['mtp']:,} multi-token prediction)" if "mtp" in parts else ")")
        + (f", {summary['residual_streams']} residual streams" if summary["residual_streams"] > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("context", "training GFLOP/token", "decode GFLOP/token", "state", "KV cache", "ratio"):
        table.add_column(name, justify="right")
    for row in summary["contexts"]:
        table.add_row(
            f"{row['tokens']:,}",
            f"{row['training_flops_per_token'] / 1e9:.3f}",
            f"{row['decode_flops_per_token'] / 1e9:.3f}",
            format_bytes(row["state_bytes"]),
            format_bytes(row["transformer_cache_bytes"]),
            f"{row['transformer_cache_bytes'] / row['state_bytes']:,.2f}",
        )
    console.print(table)
    console.print(
        "[dim]per sequence: state in float32; KV cache of a Transformer of this width and depth in 16 bit[/]",
        highlight=False,
    )
    held = ", ".join(f"{level} {format_bytes(b)}" for level, b in summary["activation_bytes_per_token"].items())
    console.print(
        f"held per token for the backward of training (bf16=true), by recompute level: {held}; recomputing adds "
        f"{format_bytes(summary['working_bytes_per_token'])} for the layer at work",
        highlight=False,
        soft_wrap=True,
    )
    print_mup(summary["mup"])
    for note in summary["on_this_device"]:
        console.print(note, highlight=False, soft_wrap=True)
    _print_windows(summary["window_layers"], summary["windows"])


def _print_windows(layers: list[int], windows: list[list[float | None]]) -> None:
    """Print windows by layer; layers of equal windows share a line."""
    by_windows: dict[tuple[float | None, ...], list[int]] = {}
    for layer, heads in zip(layers, windows, strict=True):
        numbers = by_windows.setdefault(tuple(heads), [])
        numbers += [layer] * (layer not in numbers)
    for heads, numbers in by_windows.items():
        name = f"layer{'s' if len(numbers) > 1 else ''} {spans(numbers)}"
        shown = ", ".join("no decay" if w is None else f"{w:,.0f}" for w in heads) or "gated, by token"
        console.print(f"windows of {name}, tokens: {shown}", highlight=False, soft_wrap=True)
