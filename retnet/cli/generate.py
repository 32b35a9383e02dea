"""`retnet generate`: text streamed in recurrent form, with its time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from retnet.cli._common import console, errors, load_shown, printable, read_text, unescape, write_text
from retnet.cli._options import (
    Device,
    Drafts,
    Force,
    Int8,
    MinP,
    Model,
    Speculate,
    Temperature,
    TopK,
    TopP,
    WeightDtype,
)
from retnet.system.extras import require
from retnet.system.outputs import check_new_file
from retnet.system.progress import Progress
from retnet.system.sizes import format_bytes, quantity

if TYPE_CHECKING:
    import torch

    from retnet.eval.meter import StreamMeter
    from retnet.serve.stream import TokenStream

ENDLESS = 0
LONGEST_ECHO = 2000  # characters of a prompt on a terminal


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; also from --file or standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="File that holds the prompt; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="New tokens at most; 0 continues until interrupted.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(help=r"Text that ends the output, such as '\n\n'; may be repeated.")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the prompt and the output become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logits of tokens of the output, once each.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logits of tokens of the output, per occurrence.")
    ] = 0.0,
    state: Annotated[
        Path | None,
        typer.Option(help="Snapshot that the text continues, such as the state.safetensors of `train method=state`."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Device = "auto",
    dtype: WeightDtype = None,
    int8: Int8 = False,
    speculate: Speculate = 0,
    drafts: Drafts = "auto",
    echo: Annotated[
        bool | None,
        typer.Option(help="Show the prompt before the output, dimmed; by default on a terminal, its end."),
    ] = None,
    stats: Annotated[bool, typer.Option(help="Report time and memory at the end, on standard error.")] = True,
    png: Annotated[Path | None, typer.Option(help="Plot time and memory per token into this file.")] = None,
    force: Force = False,
) -> None:
    """Stream the continuation of a prompt.

    Time and memory per token do not grow with the length of the text where every layer is retention, Mamba or attention
    with a window. The cache of attention without a window grows with every token, and so does the work of Hyena.

    Example: retnet generate retnet-tiny "def main(" --max-tokens 100
    """
    text = read_text(prompt, file)
    if text is None:
        raise ValueError('no prompt; accepted: text after the model (or "" for none), --file FILE, or text piped in')

    if png is not None:
        require("plots", "--png")  # before the text, not after it
        check_new_file(png, force=force)
    if int8:
        require("quantize", "--int8")

    from retnet.api import engine_for, load_state, load_tokenizer, request_of, stream_text
    from retnet.eval.meter import StreamMeter
    from retnet.models.cost import model_cost
    from retnet.models.decode.sampling import Sampling
    from retnet.serve.request import Failed

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    tokenizer = load_tokenizer(model)  # refused before the weights are loaded
    network = load_shown(model, device, dtype)
    if int8:
        from retnet.models.decode.int8 import quantize_int8_

        quantize_int8_(network)
    stops = [unescape(text) for text in stop or []]
    limit = None if max_tokens == ENDLESS else max_tokens
    after = load_state(state, network)
    request = request_of(text, tokenizer, limit, sampling, stops, after)
    engine = engine_for(network, request, tokenizer, speculate, after, drafts)
    meter = StreamMeter()
    failed = None
    try:
        tokens = engine.stream(request, after)
        _read_prompt(tokens)
        _echo(text, echo)
        for piece in stream_text(_metered(tokens, meter), tokenizer, stops, request.prompt):
            write_text(printable(piece) if console.is_interactive else piece)
    except KeyboardInterrupt:
        errors.print()
    except Failed as error:
        failed = error
    write_text("\n")
    if failed is not None:
        raise ValueError(str(failed)) from failed
    read = len(request.prompt) + (0 if after is None else len(after.tokens))
    sizes = [model_cost(network.config, read + count).state_bytes for count in (0, meter.tokens)]
    if stats:
        _report(meter, *sizes)
        counts = engine.stats()
        if counts.drafted:
            errors.print(
                f"[dim]{counts.accepted:,} of {counts.drafted:,} draft tokens accepted "
                f"({counts.accepted / counts.drafted:.0%})[/]",
                highlight=False,
            )
    if png is not None:
        from retnet.stack.resolve import model_label

        weights = next(network.parameters())
        dtype = "int8" if int8 else str(weights.dtype).removeprefix("torch.")
        _plot(png, meter, sizes[-1], len(request.prompt), model_label(model), f"weights {dtype}", weights.device)


def _echo(prompt: bytes, wanted: bool | None) -> None:
    """Show the prompt: all of it if asked for, its end on a terminal, nothing in a pipe."""
    if not (console.is_interactive if wanted is None else wanted):
        return
    shown = prompt.decode("utf-8", "replace")
    if wanted is None and len(shown) > LONGEST_ECHO:
        shown = "..." + shown[-LONGEST_ECHO:]
    if console.is_interactive:
        console.print(Text(printable(shown), "dim"), end="", soft_wrap=True)
    else:
        write_text(shown)


def _read_prompt(tokens: TokenStream) -> None:
    """Run the engine to the end of the prompt, with its progress."""
    from retnet.serve.request import Status

    engine, generation = tokens.engine, tokens.generation
    with Progress(errors, "reading the prompt", len(generation.request.prompt), "tokens") as shown:
        while generation.status in (Status.WAITING, Status.READING):
            engine.step()
            shown.update(engine.stats().prompt_tokens)


def _metered(tokens: Iterator[int], meter: StreamMeter) -> Iterator[int]:
    for token in tokens:
        meter.tick()
        yield token


def _report(meter: StreamMeter, first_state_bytes: int, last_state_bytes: int) -> None:
    """Time and memory at the first tenth of the stream and at the last: whether they stayed flat."""
    bins = meter.bins
    if not bins:
        first = f", after {1e3 * meter.seconds_to_first:.0f} ms" if meter.tokens else ""
        errors.print(f"[dim]{quantity(meter.tokens, 'token')}{first}[/]", highlight=False)
        return
    tenth = max(1, len(bins) // 10)
    (early_ms, early_bytes), (late_ms, late_bytes) = (
        (
            1e3 * sum(b.seconds_per_token * b.count for b in part) / sum(b.count for b in part),
            part[-1].memory_bytes,
        )
        for part in (bins[:tenth], bins[-tenth:])
    )
    state = format_bytes(first_state_bytes)
    state += " throughout" if first_state_bytes == last_state_bytes else f", then {format_bytes(last_state_bytes)}"
    errors.print(
        f"[dim]{meter.tokens:,} tokens, the first after {1e3 * meter.seconds_to_first:.0f} ms, then "
        f"{(meter.tokens - 1) / meter.seconds:,.0f} tokens/s; "
        f"{early_ms:.2f} ms per token at the start, {late_ms:.2f} ms at the end; "
        f"state {state}; process {format_bytes(early_bytes, 3)}, then {format_bytes(late_bytes, 3)}[/]",
        soft_wrap=True,
        highlight=False,
    )


def _plot(
    png: Path, meter: StreamMeter, state_bytes: int, prompt: int, model: str, weights: str, device: torch.device
) -> None:
    """Write the picture of time and memory per token. prompt: its tokens."""
    from retnet.eval.figures import save_stream_figure
    from retnet.ops.device import hardware
    from retnet.plots.frame import facts

    under = facts(f"{meter.tokens:,} tokens after a prompt of {prompt:,}", weights, hardware(device))
    save_stream_figure(meter.bins, state_bytes, png, title=f"Generation by {model}", under=under)
