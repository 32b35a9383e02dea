"""`retnet stack`: check, explain and compile architectures written in EulerStack's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from retnet.cli._common import console, errors
from retnet.cli._mup import mup_rules, print_mup
from retnet.cli._options import Force
from retnet.system.extras import MissingExtra, needs, require
from retnet.system.files import written_whole
from retnet.system.outputs import check_new_directory, check_new_file, replaced_directory
from retnet.system.progress import Progress
from retnet.system.sizes import quantity
from retnet.system.suggest import did_you_mean_path

if TYPE_CHECKING:
    from retnet.data.tokenizer import Tokenizer
    from retnet.models.config import ModelConfig
    from retnet.stack import Stack, StackError
    from retnet.stack.summary import LayerSummary

_TOKENIZER_FOLDER = ".tokenizer"  # in the directory, while its files are written
_TRAINER_STATE = "trainer_state.json"  # in every checkpoint: transformers' name
CONTEXTS = (1024, 8192, 32768, 131072)

stack_app = typer.Typer(
    help="Architectures in YAML: attention, Mamba, RetNet and Hyena in one model.\n\n"
    "Example: retnet stack explain arch_expert_research",
    no_args_is_help=True,
)
presets_app = typer.Typer(
    help="The stacks included in the package.\n\nExample: retnet stack presets list", no_args_is_help=True
)
stack_app.add_typer(presets_app, name="presets")

StackName = Annotated[
    str,
    typer.Argument(
        metavar="STACK", help="Stack file, stack preset, or the directory of a model compiled from a stack."
    ),
]


@stack_app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="STACK...", help="Stack files or stack presets.")],
    report: Annotated[
        bool, typer.Option("--report", help="Also show unusual choices, parameters, and costs by context length.")
    ] = False,
) -> None:
    """Check stacks and list every fault with line and column; exit code 1 if there is any.

    Example: retnet stack validate my-stack.yml --report
    """
    from retnet.stack import StackError

    failed = False
    for name in files:
        try:
            stack = _open(name)
            console.print(Text.assemble((name, "bold"), f": valid, {len(stack.layers)} layers"), soft_wrap=True)
            if report:
                _print_report(stack)
        except StackError as error:
            failed = True
            _print_problems(name, error)
    if failed:
        raise typer.Exit(1)


@stack_app.command()
def explain(
    name: StackName,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Also draw the stack, as .svg, .png or .pdf.", dir_okay=False)
    ] = None,
    force: Force = False,
) -> None:
    """Show a stack's layers, sizes and costs.

    Example: retnet stack explain arch_expert_research --picture tri-mixer.svg
    """
    if picture is not None:
        require("plots", "--picture")
        check_new_file(picture, force=force)

    from retnet.models.cost import device_notes
    from retnet.ops.device import resolve_device
    from retnet.stack.build import model_config

    stack = _open(name)
    config = model_config(stack)
    _print_layers(stack, config)
    _print_residual_streams(stack, config)
    _print_multi_token(stack)
    _print_parameters(config)
    print_mup(mup_rules(config))
    _print_costs(config)
    for note in device_notes(config, stack.spec.model.max_seq_len, resolve_device("auto").type):
        console.print(note, soft_wrap=True, highlight=False)
    if picture is not None:
        from retnet.stack.picture import draw_stack, save_picture

        save_picture(draw_stack(stack, config), picture)
        console.print(f"picture written to {picture}", markup=False, soft_wrap=True)


@stack_app.command("compile")
def compile_stack(
    name: StackName,
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Directory to write, new or empty.", file_okay=False)
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer to put beside it: a tokenizer.json, a folder with one, or a model of the hub."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the directory of a model with all that is in it.")
    ] = False,
) -> None:
    """Build a stack's model with its initial weights and save it as a model directory.

    The byte tokenizer is written where the stack names it. Another one comes with --tokenizer: no other part of this
    command uses the network.

    Example: retnet stack compile arch_expert_research_mini --output-dir tri-mixer
    """
    from retnet.models.cost import parameter_counts
    from retnet.models.directory import save_model
    from retnet.models.lm import LanguageModel
    from retnet.stack.build import model_config

    _check_output(output_dir, force)
    stack = _open(name)
    config = model_config(stack)
    found = None if tokenizer is None else _tokenizer_for(config, tokenizer)
    with Progress(errors, f"building {config.name}") as shown, replaced_directory(output_dir) as folder:
        model = LanguageModel(config)
        shown.begin(f"writing {output_dir}")
        save_model(model, folder)
        note = _write_tokenizer(stack, found, folder)
    total = parameter_counts(config)["total"]
    console.print(
        f"{config.name}: {total:,} parameters in {config.dtype}, written to {output_dir}, {note}",
        markup=False,
        soft_wrap=True,
    )


@stack_app.command()
def source(name: StackName) -> None:
    """Print the text of a stack, or of the stack that a model was compiled from.

    Example: retnet stack source my-model > my-stack.yml
    """
    print(_open(name).text, end="")


@presets_app.command("list")
def list_presets() -> None:
    """List the stack presets with parameters, state per sequence and descriptions. Each is a model for every verb.

    Example: retnet stack presets list
    """
    from retnet.cli._presets import preset_table
    from retnet.stack.build import model_config
    from retnet.stack.presets import load_preset, preset_names, preset_summary

    rows = ((name, model_config(load_preset(name)), preset_summary(name)) for name in preset_names())
    console.print(preset_table(rows))
    console.print("[dim]state per sequence; each name is a MODEL: retnet train model=NAME data=...[/]", highlight=False)


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(help="A stack preset's name.")]) -> None:
    """Print a stack preset's file.

    Example: retnet stack presets show arch_expert_research
    """
    from retnet.stack.presets import preset_text

    print(preset_text(name), end="")


@presets_app.command("copy")
def copy_preset(
    name: Annotated[str, typer.Argument(help="A stack preset's name.")],
    target: Annotated[Path | None, typer.Argument(help="New file to write; NAME.yml by default.")] = None,
    force: Force = False,
) -> None:
    """Copy a stack preset's file for editing.

    Example: retnet stack presets copy arch_expert_research my-stack.yml
    """
    from retnet.stack.presets import preset_text

    target = target or Path(f"{name}.yml")
    text = preset_text(name)
    check_new_file(target, force=force)
    with written_whole(target) as file:
        file.write(text.encode())
    console.print(f"written to {target}", markup=False, soft_wrap=True)


def _check_output(directory: Path, force: bool) -> None:
    """Raise FileExistsError for a directory that holds something, with force only if that is no saved model.

    Checkpoints are never replaced.
    """
    from retnet.models.directory import load_config

    if (directory / _TRAINER_STATE).exists() or next(directory.glob("checkpoint-*"), None) is not None:
        raise FileExistsError(f"{directory} holds checkpoints of a run; accepted: another directory")
    check_new_directory(directory, force=force, accepted="a new or empty directory, or --force")
    if force and directory.is_dir() and any(directory.iterdir()):
        try:
            load_config(directory)
        except (OSError, ValueError) as error:
            raise FileExistsError(f"--force replaces the directory of a saved model only: {error}") from error


def _tokenizer_for(config: ModelConfig, name: str) -> Tokenizer:
    from retnet.data.tokenizer_json import find_tokenizer

    found = find_tokenizer(name)
    if found.vocab_size > config.vocab_size:
        raise ValueError(f"{name} has {found.vocab_size:,} tokens; accepted: at most the stack's {config.vocab_size:,}")
    return found


def _write_tokenizer(stack: Stack, given: Tokenizer | None, directory: Path) -> str:
    """Write the given tokenizer, or the stack's if that is bytes; returns what was written, in words."""
    from retnet.data.tokenizer import BYTES, ByteTokenizer

    named = stack.spec.tokenizer_contract.pretrained
    if given is None and named != BYTES:
        return f"without a tokenizer: --tokenizer {named} would fetch the stack's from the hub"
    if given is not None and not isinstance(given, ByteTokenizer):
        given.save(directory / _TOKENIZER_FOLDER)
        for file in (directory / _TOKENIZER_FOLDER).iterdir():
            file.rename(directory / file.name)
        (directory / _TOKENIZER_FOLDER).rmdir()
        return "with its tokenizer"
    try:
        with needs("hf", "The byte tokenizer of transformers"):
            from retnet.models.hf.tokenizer import byte_tokenizer
    except MissingExtra as error:
        return f"without the files of the byte tokenizer, which retnet reads without them: {error}"
    byte_tokenizer().save_pretrained(str(directory))
    return "with the byte tokenizer"


def _open(name: str) -> Stack:
    if Path(name).is_dir():
        from retnet.stack.resolve import resolve_stack

        stack = resolve_stack(name)
        if stack is None:
            raise ValueError(
                f"the model in {name} was not compiled from a stack; accepted: a stack file, or one that was"
            )
        return stack
    from retnet.stack import load_stack
    from retnet.stack.presets import load_preset, preset_names
    from retnet.stack.resolve import STACK_SUFFIXES, is_stack_file

    if name not in preset_names() and not is_stack_file(name) and not Path(name).exists():
        raise FileNotFoundError(
            f"no stack {name!r}; accepted: a stack file ({', '.join(STACK_SUFFIXES)}), a stack preset (`retnet stack "
            "presets list`), or the directory of a model compiled from a stack"
            f"{did_you_mean_path(name, preset_names())}"
        )
    return load_preset(name) if name in preset_names() else load_stack(name)


def _print_problems(name: str, error: StackError) -> None:
    errors.print(Text.assemble((name, "bold"), f": {quantity(len(error.faults), 'fault')}"), soft_wrap=True)
    errors.print(Text(str(error)), soft_wrap=True)


def _print_report(stack: Stack) -> None:
    from retnet.stack.build import model_config
    from retnet.stack.report import realism_report

    for finding in realism_report(stack):
        style = "yellow" if finding.severity == "WARNING" else "dim"
        line = Text.assemble((f"{finding.severity:8}", style), f"{finding.rule}: {finding.message}")
        console.print(line, soft_wrap=True)
    config = model_config(stack)
    _print_parameters(config)
    _print_costs(config)


def _print_parameters(config: ModelConfig) -> None:
    from retnet.models.cost import idle_parameters, parameter_counts

    counts = parameter_counts(config)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if part != "total")
    idle = idle_parameters(config)
    active = f"; {counts['total'] - idle:,} active per token" if idle else ""
    console.print(
        f"parameters of the built model: {counts['total']:,} ({parts}){active}", soft_wrap=True, highlight=False
    )


def _print_layers(stack: Stack, config: ModelConfig) -> None:
    from retnet.stack.report import short_count
    from retnet.stack.summary import runs, summarize

    columns = ("layers", "template", "mixer", "feed-forward", "norm", "parameters")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column == "parameters" else "left")
    rows = runs(summarize(stack, config))
    turn = _period(rows)
    turns, stride = len(rows) // turn, sum(count for count, _ in rows[:turn])
    for count, row in rows[:turn]:
        first, layer = row.layer.index, row.layer
        span = str(first) if count == 1 else f"{first}-{first + count - 1}"
        if turns > 1:
            span += f", {first + stride}" + (f" .. {first + (turns - 1) * stride}" if turns > 2 else "")
        norm = f"{layer.norm.position}-{layer.norm.type}" + layer.residual.suffix
        norm = "in the streams" if layer.streams else norm
        parameters = short_count(turns * count * (row.mixer_parameters + row.feed_forward_parameters))
        table.add_row(*map(Text, (span, layer.template, row.mixer, row.feed_forward, norm, parameters)))
    console.print(table)


def _print_residual_streams(stack: Stack, config: ModelConfig) -> None:
    from retnet.models.cost import hyper_connection_cost, model_cost, residual_streams
    from retnet.stack.report import short_count

    layers = [inner for layer in stack.layers for inner in layer.inner]
    found = dict.fromkeys(layer.residual.hyper.words() for layer in layers if layer.residual.hyper)
    if not found:
        return
    flops, context = hyper_connection_cost(config), stack.spec.model.max_seq_len
    share = flops / model_cost(config, context).forward_flops
    most = max(map(residual_streams, config.layers))
    console.print(
        f"hyper-connections: {', '.join(found)}; {short_count(round(flops))} FLOPs per token forward ({share:.1%} at a "
        f"context of {context}); training holds up to {most} hidden states per token and branch; decoding carries none",
        markup=False, soft_wrap=True, highlight=False,
    )  # fmt: skip


def _print_multi_token(stack: Stack) -> None:
    from retnet.stack.layers import multi_token_layer
    from retnet.stack.summary import feed_forward_words

    mtp, layer = stack.spec.head.mtp, multi_token_layer(stack.spec)
    if mtp is None or layer is None:
        return
    modules = quantity(mtp.n_predict, "module")
    each = f"{quantity(mtp.head_layers, 'layer')} of template {layer.template}"
    console.print(
        f"multi-token prediction: {modules}, each {each} ({layer.mixer.words(layer.mixer_type)}; "
        f"{feed_forward_words(layer, stack)}), loss weight {mtp.train_loss_weight:g}",
        markup=False, soft_wrap=True, highlight=False,
    )  # fmt: skip


def _period(rows: list[tuple[int, LayerSummary]]) -> int:
    """The number of runs of equal layers after which the pattern repeats to the end."""
    kinds = [(count, row.layer.template, row.config) for count, row in rows]
    return next(p for p in range(1, len(kinds) + 1) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))


def _print_costs(config: ModelConfig) -> None:
    from retnet.models.cost import model_cost
    from retnet.ops.device import resolve_device
    from retnet.plots.numbers import tokens
    from retnet.stack.report import short_count
    from retnet.system.sizes import format_bytes

    device = resolve_device("auto").type
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("context", "FLOPs/token: training", "decoding", "state/sequence"):
        table.add_column(column, justify="right")
    for context in CONTEXTS:
        cost = model_cost(config, context, device)
        flops = (short_count(round(cost.training_flops)), short_count(round(cost.decode_flops)))
        table.add_row(tokens(context), *flops, format_bytes(cost.state_bytes, digits=3))
    console.print(table)
