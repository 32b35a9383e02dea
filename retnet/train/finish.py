"""Results of a finished run: the model with its tokenizer, the log, the loss curve, and sampled continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedTokenizerBase
from transformers.training_args import TrainingArguments

from retnet.data import Corpus
from retnet.data.chat_files import TEMPLATE_FILE
from retnet.models.decode.generation import generate
from retnet.models.directory import PREFIX, load_model, write_model
from retnet.models.states import ModelState
from retnet.models.tensor_files import Tensors
from retnet.ops.device import hardware
from retnet.stack.resolve import tokenizer_of
from retnet.system.files import write_json, written_whole
from retnet.train.checkpoints import publish, staged
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.recipe import Recipe
from retnet.train.stopping import TerminationSignal
from retnet.train.trainer import PackedTrainer

SUMMARY_FILE = "training.json"
CURVE_FILE = "loss_curve.png"
SAMPLES_FILE = "samples.txt"
PROMPT_TOKENS = 32
SAMPLE_TOKENS = 128
TEMPERATURE = 0.8


@dataclass(frozen=True)
class TrainingSummary:
    """Totals of a run; also in `training.json` beside the weights, with the log.

    seconds: of training, over all resumed parts, with the validation and checkpoints during it. data_wait: share of
    the steps' time spent waiting for batches. mfu_peak: the peak rate that MFU refers to.
    """

    steps: int
    tokens: int
    seconds: float
    train_bytes: int
    valid_bytes: int
    valid_loss: float | None
    valid_perplexity: float | None
    valid_bits_per_byte: float | None
    parameters: int
    data_wait: float
    mfu_peak: str


def save_whole_model(trainer: PackedTrainer, output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model, in the dtype that it had before the run, and its tokenizer into the run's directory.

    They are staged first. All processes call this.
    """
    final = cast(PackedForCausalLM, trainer.model).saving_final()
    with staged(output, "model", writes=trainer.args.should_save) as staging, final:
        if trainer.args.should_save:
            staging.mkdir()
        trainer.accelerator.wait_for_everyone()
        if trainer.is_fsdp_enabled:  # the Trainer saves no whole model of sharded weights
            _save_sharded(trainer, staging)
        else:
            trainer.save_model(str(staging), _internal_call=True)  # pushed once the directory is whole
        if trainer.args.should_save:
            (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle: nobody should have to load one
            tokenizer.save_pretrained(str(staging))
            if not (staging / TEMPLATE_FILE).exists():  # of an earlier run into this directory
                (output / TEMPLATE_FILE).unlink(missing_ok=True)
            publish(staging, output)
    trainer.accelerator.wait_for_everyone()


def _save_sharded(trainer: PackedTrainer, directory: Path) -> None:
    """Gather the weights of all processes in the memory of the first, which writes them."""
    model = cast(PackedForCausalLM, trainer.model)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.args.should_save:
        tensors = {
            name.removeprefix(PREFIX): x
            for name, x in gathered.items()
            if isinstance(x, torch.Tensor) and name not in model.tied_names
        }
        if model.final_dtypes is not None:
            tensors = {name: x.to(model.final_dtypes[name]) for name, x in tensors.items()}
        write_model(directory, model.model.config, Tensors.of(tensors))


def continuations(
    directory: Path,
    corpus: Corpus,
    count: int,
    seed: int,
    device: torch.device,
    stop: TerminationSignal,
    state: ModelState | None = None,
) -> list[tuple[str, str]]:
    """Pairs of text: the beginning of a validation document, and a continuation sampled from the saved model.

    stop: once it is received, no more are made. state: that the texts start from.
    """
    if not count or stop.received:
        return []
    model = load_model(directory, device=device)
    tokenizer = tokenizer_of(model.config, model.directory)
    generator = torch.Generator(device).manual_seed(seed)
    texts = []
    for document in range(min(count, len(corpus))):
        if stop.received:
            break
        tokens = corpus.prompt(document, PROMPT_TOKENS)
        prompt = torch.tensor(tokens.astype("int64"), device=device)[None]
        new = generate(model, prompt, SAMPLE_TOKENS, state=state, temperature=TEMPERATURE, generator=generator)
        decoder = tokenizer.stream_decoder()
        begun = "".join(map(decoder.push, prompt[0].tolist()))
        # One decoder for both: the prompt may end inside a character, and its tokens decide about the next space.
        until_end = takewhile(lambda token: token not in model.eos_token_ids, map(int, new))
        texts.append((begun, "".join(map(decoder.push, until_end)) + decoder.flush()))
    return texts


def record(
    output: Path,
    recipe: Recipe,
    arguments: TrainingArguments,
    summary: TrainingSummary,
    log: Sequence[dict[str, Any]],
    samples: Sequence[tuple[str, str]],
    console: Console,
) -> None:
    """Write the log, the loss curve and the samples, and print the samples."""
    data = {
        "recipe": recipe.model_dump(mode="json", exclude={"training"}) | {"training": arguments.to_sanitized_dict()},
        "summary": asdict(summary),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "log": log,
    }
    write_json(output / SUMMARY_FILE, data)
    _draw_curve(output / CURVE_FILE, recipe, arguments, summary, log)
    if samples:
        text = "\n\n".join(f"--- {number}\n{begun}>>>{new}" for number, (begun, new) in enumerate(samples, 1)) + "\n"
        with written_whole(output / SAMPLES_FILE) as file:
            file.write(text.encode())
        for begun, new in samples:
            console.print(f"[dim]{_line(begun)}[/]{_line(new)}", highlight=False, soft_wrap=True)


def _draw_curve(
    path: Path, recipe: Recipe, arguments: TrainingArguments, summary: TrainingSummary, log: Sequence[dict[str, Any]]
) -> None:
    from retnet.plots.frame import facts
    from retnet.plots.numbers import short
    from retnet.train.curve import save_loss_curve

    data = " + ".join(Path(source).name for source in recipe.weights)
    processes = f"{arguments.world_size} x " if arguments.world_size > 1 else ""
    under = facts(
        f"{short(summary.parameters)} parameters",
        f"{summary.steps:,} steps in {_minutes(summary.seconds)}",
        processes + hardware(arguments.device),
    )
    title = f"{Path(recipe.model).name} on {data}"
    save_loss_curve(log, summary.tokens / summary.steps, path, title=title, under=under)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def _line(text: str) -> str:
    """Text on one line, safe for rich."""
    return escape("".join(c if c.isprintable() else " " for c in " ".join(text.split()))) + " "
