"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = "Preset, stack file or saved directory."
DEVICE_HELP = "auto (the GPU if there is one), cpu, cuda or cuda:N."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
WeightDtype = Annotated[
    str | None,
    typer.Option(help="Dtype of the weights: float32, bfloat16, float16 or float64; by default as saved."),
]
Int8 = Annotated[bool, typer.Option("--int8", help=r"Quantise weights to int8 (needs retnet\[quantize]).")]
Speculate = Annotated[int, typer.Option(min=0, help="Draft tokens per step: 3, 7, 11, ...; 0 is off.")]
Drafts = Annotated[
    str, typer.Option(help="Source of draft tokens: mtp (modules of the model), context, or auto (mtp if there).")
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of total probability p.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens at least p times as likely as the likeliest.")]
TrainingData = Annotated[str | None, typer.Option(help="Shards, file or folder of text, or 'stdlib'; same as data=...")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
