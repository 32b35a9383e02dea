"""`retnet train`: training from a recipe, `key=value` arguments, or both."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from retnet.cli._common import console
from retnet.cli._options import TrainingData
from retnet.system.extras import needs, require
from retnet.system.progress import Progress
from retnet.system.sizes import format_count


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...", help="A YAML file of settings, then settings that override it."
        ),
    ] = None,
    data: TrainingData = None,
    model: Annotated[str | None, typer.Option(help="Preset, stack file or saved directory; same as model=...")] = None,
) -> None:
    """Train a model on text.

    Settings are model, data (a source, or several with weights), valid, length (tokens per row), context_parallel
    (processes that share a row), carry_state, max_minutes, and every field of transformers' TrainingArguments:
    learning_rate, max_steps, bf16, torch_compile, resume_from_checkpoint (auto takes the newest complete checkpoint),
    ... By default a step reads 8 rows of 1024 tokens, and the run is one pass over the training documents. It trains on
    the GPU if there is one (use_cpu=true: on the CPU).

    After a SIGTERM or Ctrl-C the step is finished and a checkpoint is saved; the exit code is 143 or 130.

    Example: retnet train data=my/texts model=retnet-tiny max_steps=1000
    """
    words = words or []
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ValueError(
            f"{len(files)} recipes are given ({', '.join(files)}); accepted: one, and settings as key=value"
        )

    require("train", "retnet train", "transformers", "accelerate")
    if int(os.environ.get("RANK", "0")) > 0:  # only the first process of torchrun prints
        console.quiet = True
    with needs("train", "retnet train"), Progress(console, "importing PyTorch and transformers"):
        from torch import distributed as dist
        from transformers.utils.logging import disable_progress_bar

        from retnet.train.recipe import load_recipe
        from retnet.train.report import REPORT_FILE
        from retnet.train.run import train as run
        from retnet.train.stopping import Terminated

    recipe = load_recipe(files[0] if files else None, [w for w in words if "=" in w], data=data, model=model)
    disable_progress_bar()  # of transformers, one for every file that it writes
    try:
        summary = run(recipe, console)
    except Terminated as ended:
        console.print(str(ended), highlight=False, soft_wrap=True)
        raise typer.Exit(ended.exit_code) from ended
    rate = summary.tokens / summary.seconds
    parts = [f"{format_count(summary.tokens)} tokens in {summary.seconds:.0f} s ({rate:,.0f} tokens/s)"]
    if summary.valid_bits_per_byte is not None:
        parts.append(
            f"validation perplexity {summary.valid_perplexity:.2f}, {summary.valid_bits_per_byte:.3f} bits per byte"
        )
    console.print(
        "; ".join([*parts, f"saved in {recipe.training['output_dir']}, with {REPORT_FILE}"]),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if dist.is_initialized():
        dist.destroy_process_group()
