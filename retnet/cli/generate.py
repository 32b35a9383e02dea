"""`retnet generate`: text streamed in recurrent form, and what it cost."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet.cli._common import errors, read_text

if TYPE_CHECKING:
    from retnet.eval.meter import StreamMeter

ENDLESS = 0
PROMPT_BLOCK = 2048  # bytes of the prompt a call: bounds the memory of its activations


def generate(
    model: Annotated[str, typer.Argument(help="Preset, stack file or saved directory.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from; also --file or standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="File that holds the prompt; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens to make; 0 goes on until interrupted.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of mass p.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    stats: Annotated[bool, typer.Option(help="Say at the end what time and memory it took (standard error).")] = True,
    png: Annotated[Path | None, typer.Option(help="Draw time and memory per token here.")] = None,
) -> None:
    """Stream text. Memory and time per token do not grow, however long it gets."""
    text = read_text(prompt, file)

    from retnet.data import ByteTokenizer
    from retnet.eval.bits import check_reads_bytes
    from retnet.eval.figures import save_stream_figure
    from retnet.models.cost import model_cost
    from retnet.models.decode.sampling import Sampling
    from retnet.serve.engine import Engine
    from retnet.serve.pool import growing_layer
    from retnet.serve.request import Request
    from retnet.stack.resolve import resolve_model

    network = resolve_model(model, device=device)
    check_reads_bytes(network)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ids = ByteTokenizer().encode(text).tolist()
    limit = None if max_tokens == ENDLESS else max_tokens
    growing = growing_layer(network.config)
    if limit is None and growing is not None:
        raise ValueError(
            f"--max-tokens is 0 and layer {growing} is attention without a window, whose cache grows; accepted with "
            "this model: 1 or more"
        )
    engine = Engine(
        network,
        num_slots=1,
        max_tokens=None if limit is None else len(ids) + limit,
        prompt_block=PROMPT_BLOCK,
        prompt_budget=PROMPT_BLOCK,
    )
    meter = _stream(engine.stream(Request(ids, limit, sampling)))
    sizes = [model_cost(network.config, len(text) + 1 + count).state_bytes for count in (0, meter.tokens)]
    if stats:
        _report(meter, *sizes)
    if png is not None:
        save_stream_figure(meter.bins, sizes[-1], png)


def _stream(tokens: Iterable[int]) -> StreamMeter:
    """Print tokens as text while they come; an interrupt ends the stream. Raises ValueError if it fails."""
    from retnet.data import ByteTokenizer
    from retnet.eval.meter import StreamMeter
    from retnet.serve.request import Failed

    decoder = ByteTokenizer().stream_decoder()
    meter, failed = StreamMeter(), None
    try:
        for token in tokens:
            _write(decoder.push(token))
            meter.tick()
    except KeyboardInterrupt:
        errors.print()
    except Failed as error:
        failed = error
    _write(decoder.flush() + "\n")
    if failed is not None:
        raise ValueError(str(failed)) from failed
    return meter


def _write(text: str) -> None:
    sys.stdout.write(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()


def _report(meter: StreamMeter, first_state_bytes: int, last_state_bytes: int) -> None:
    """Whether time and memory stayed flat: the first tenth of the stream and the last."""
    state = f"{first_state_bytes / 2**20:.2f} MiB"
    state += " throughout" if first_state_bytes == last_state_bytes else f", then {last_state_bytes / 2**20:.2f} MiB"
    bins = meter.bins
    if not bins:
        return
    tenth = max(1, len(bins) // 10)
    (early_ms, early_mb), (late_ms, late_mb) = (
        (
            1e3 * sum(b.seconds_per_token * b.count for b in part) / sum(b.count for b in part),
            part[-1].memory_bytes / 2**20,
        )
        for part in (bins[:tenth], bins[-tenth:])
    )
    errors.print(
        f"[dim]{meter.tokens} tokens, the first after {1e3 * meter.seconds_to_first:.0f} ms, then "
        f"{(meter.tokens - 1) / meter.seconds:.0f} tokens/s; "
        f"{early_ms:.2f} ms a token at the start, {late_ms:.2f} ms at the end; "
        f"state {state}; process {early_mb:.0f} MiB, then {late_mb:.0f} MiB[/]",
        soft_wrap=True,
        highlight=False,
    )
