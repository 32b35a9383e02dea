"""`retnet distil`: a Transformer becomes a hybrid of retention and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retnet.cli._common import console
from retnet.cli._options import TrainingData
from retnet.system.extras import needs, require
from retnet.system.progress import Progress
from retnet.system.sizes import format_count


def distil(
    teacher: Annotated[Path, typer.Argument(help="Directory that retnet saved or `retnet convert` reads.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, new or empty.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings as of `retnet train`; layers.KEY or logits.KEY: of one stage."
        ),
    ] = None,
    data: TrainingData = None,
    stack: Annotated[
        str | None, typer.Option(help="Stack file: which layers become retention (retnet), and with which settings.")
    ] = None,
    keep_attention: Annotated[
        int | None, typer.Option(help="How many attention layers stay, chosen by measured loss.")
    ] = None,
    cross_entropy: Annotated[
        float, typer.Option(help="Its weight in the loss of the last stage; the divergence has the rest.")
    ] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what OUT holds.")] = False,
) -> None:
    """Turn a Llama-like Transformer into a hybrid of retention and attention.

    The student takes the teacher's weights. Stage `layers` trains its retention layers to give what the teacher's
    attention layers give. With --keep-attention, attention then returns to the layers that need it most. Stage `logits`
    trains the whole student on the teacher's predictions. Together the stages read the training documents once,
    unless max_steps or num_train_epochs says otherwise. The attention layers are those of --stack without
    --keep-attention.

    After a SIGTERM or Ctrl-C the step is finished and a checkpoint is saved; --resume continues from there.

    Example: retnet distil my-llama my-hybrid --keep-attention 4 --data my/texts
    """
    require("train", "retnet distil", "transformers", "accelerate")
    with needs("train", "retnet distil"), Progress(console, "importing PyTorch and transformers"):
        from transformers.utils.logging import disable_progress_bar

        from retnet.stack.resolve import written_stack
        from retnet.train.distil.stages import Request
        from retnet.train.distil.stages import distil as run
        from retnet.train.stopping import Terminated

    disable_progress_bar()  # of transformers, one for every file that it writes
    layers = None if stack is None else written_stack(stack)
    if stack is not None and layers is None:
        raise ValueError(f"stack is {stack!r}; accepted: a stack preset, or a file that ends in .yml or .yaml")
    request = Request(teacher, out, layers, keep_attention, cross_entropy, data, tuple(words or ()), resume)
    try:
        outcome = run(request, console)
    except Terminated as ended:
        console.print(f"{ended}. --resume continues", highlight=False, soft_wrap=True)
        raise typer.Exit(ended.exit_code) from ended
    attention = ", ".join(map(str, outcome.attention)) or "none"
    parts = [f"{format_count(outcome.tokens)} tokens; attention in layers {attention}"]
    if outcome.student_perplexity is not None:
        ratio = outcome.student_perplexity / outcome.teacher_perplexity
        parts.append(
            f"validation perplexity {outcome.student_perplexity:.2f}, {ratio:.3f} times the teacher's "
            f"{outcome.teacher_perplexity:.2f}"
        )
    console.print("; ".join([*parts, f"saved in {out}"]), markup=False, highlight=False, soft_wrap=True)
