"""`retnet eval`: bits per byte beside compressors, perplexity of a file, or tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from retnet.cli._common import console, errors, load_shown, print_json, silent
from retnet.cli._options import AsJson, Device, Force, Model
from retnet.system.extras import needs, require
from retnet.system.outputs import check_new_file
from retnet.system.progress import Progress

if TYPE_CHECKING:
    from retnet.eval.processes import Processes

VALID_FRACTION = 0.05


class Part(StrEnum):
    """The side of the split to score."""

    valid = "valid"
    all = "all"


def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option(help="Shards, file or folder of text, or 'stdlib': bits per byte.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File of text: perplexity, read as one context.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="With --file: also score it in windows of this many tokens.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="With --context: tokens scored per window; all by default.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="With --tasks: few-shot examples per context.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: documents per task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: folder with your own tasks.")] = None,
    part: Annotated[
        Part | None, typer.Option(help="With --data: the held-out documents (the default), or all of them.")
    ] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help=f"Share that is held out, as in training; by default {VALID_FRACTION}.")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="With --tasks: file for requests and scores per document, as JSON lines."),
    ] = None,
    force: Force = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on text: one of --data, --file and --tasks.

    --data: bits per byte, each document in one context, beside gzip -9, xz -9 and an order-2 byte model. The order-2
    model is trained on the training documents, so it is shown for the held-out part only. A model trained on token
    shards has its held-out documents there: give the same shards.

    Under torchrun or accelerate launch, processes share the work and the first one prints the result of one process.

    Example: retnet eval out/demo --data my/texts
    """
    if sum(option is not None for option in (data, file, tasks)) != 1:
        raise ValueError("accepted: one of --data, --file and --tasks")
    _refuse_unused("--data", data, {"--part": part, "--valid-fraction": valid_fraction})
    _refuse_unused("--file", file, {"--context": context, "--stride": stride})
    _refuse_unused("--tasks", tasks, {"--num-fewshot": num_fewshot, "--limit": limit, "--include-path": include_path})
    _refuse_unused("--tasks", tasks, {"--samples": samples})
    if part is Part.all and valid_fraction is not None:
        raise ValueError(
            "--valid-fraction is given with --part all, which holds nothing out; accepted with it: --part valid"
        )
    if samples is not None:
        check_new_file(samples, force=force)
    if tasks is not None:
        require("eval", "--tasks")
    from retnet.eval.processes import SharedError, launched

    with launched() as processes:
        device = processes.device(device)
        try:
            if tasks is not None:
                words = {"num_fewshot": num_fewshot, "limit": limit}
                _run_tasks(model, tasks.split(","), device, words, include_path, samples, as_json, processes)
            elif file is not None:
                _perplexity(model, file, context, stride, device, as_json, processes)
            elif data is not None:
                held_out = VALID_FRACTION if valid_fraction is None else valid_fraction
                _bits_per_byte(model, data, part or Part.valid, held_out, device, as_json, processes)
        except SharedError:
            if processes.is_first:
                raise
            raise typer.Exit(2) from None


def _refuse_unused(source: str, given: object, options: Mapping[str, object]) -> None:
    """Raise ValueError for options that have no effect without `source`."""
    unused = [name for name, value in options.items() if value is not None]
    if given is None and unused:
        raise ValueError(f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} for {source}, which is not given")


def _bits_per_byte(
    model: str, data: str, part: Part, valid_fraction: float, device: str, as_json: bool, processes: Processes
) -> None:
    from retnet.api import load_tokenizer
    from retnet.data import open_corpus
    from retnet.data.corpus import ByteCorpus
    from retnet.eval.bits import bits_per_byte, corpus_bits_per_byte
    from retnet.eval.compressors import compressor_table, texts_of

    tokenizer = load_tokenizer(model)  # refused before the weights are loaded, as is the data
    corpus = open_corpus(data)
    network = load_shown(model, device, quiet=not processes.is_first)
    train, scored = corpus.split(valid_fraction) if part is Part.valid else (None, corpus)
    if isinstance(scored, ByteCorpus):  # files of text, in the tokens of any model
        result_of = partial(bits_per_byte, network, tokenizer, scored.documents)
    elif tokenizer.same_tokens(scored.tokenizer):
        result_of = partial(corpus_bits_per_byte, network, scored)
    else:
        raise ValueError(
            f"{data} holds tokens of another tokenizer than that of {model}; accepted: text, or tokens that `retnet "
            "data` wrote with its tokenizer"
        )
    share = scored.num_targets // processes.count
    with Progress(errors if processes.is_first else silent, "scoring", share, "tokens") as shown:
        began = time.perf_counter()
        result = result_of(on_tokens=shown.advance, processes=processes)
        seconds = time.perf_counter() - began
        if not processes.is_first:
            return
        rows = compressor_table(None if train is None else texts_of(train), texts_of(scored), shown.begin)
    rows[model] = result.bits_per_byte
    if as_json:
        print_json({"documents": len(scored), "bytes": result.num_bytes, "seconds": seconds, "bits_per_byte": rows})
        return
    size = f"{len(scored):,} documents, {result.num_bytes / 1e6:.2f} MB"
    console.print(f"{escape(data)}: {size} ({part.value})", highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method")
    table.add_column("bits per byte", justify="right")
    for name, bits in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(*(Text(cell, "bold" if name == model else "") for cell in (name, f"{bits:.3f}")))
    console.print(table)
    for line in (*_explained(rows), f"scored {result.num_bytes / seconds:,.0f} bytes/s"):
        console.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)


def _explained(rows: Mapping[str, float]) -> Iterator[str]:
    """The rows of the table in words."""
    from retnet.eval.compressors import ORDER2

    yield "lower is better; gzip and xz copy what the scored text repeats, so they win on text that repeats a lot"
    if ORDER2 in rows:
        yield f"{ORDER2}: predicts a byte from the two before it, by their counts in the training documents"


def _perplexity(
    model: str,
    file: Path,
    context: int | None,
    stride: int | None,
    device: str,
    as_json: bool,
    processes: Processes,
) -> None:
    from retnet.api import load_tokenizer
    from retnet.eval.perplexity import perplexity

    tokenizer = load_tokenizer(model)  # refused before the weights are loaded, as is the text
    try:
        text = _bytes_of(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; accepted: text in UTF-8") from error
    network = load_shown(model, device, quiet=not processes.is_first)
    with Progress(errors if processes.is_first else silent, "scoring", unit="tokens") as shown:

        def on_tokens(done: int, total: int) -> None:
            shown.update(done, total=total)

        read = partial(perplexity, network, tokenizer, text, on_tokens=on_tokens, processes=processes)
        results = {"stateful": read()}
        if context is not None or stride is not None:
            shown.begin("scoring windows", unit="tokens")
            results["strided"] = read(context=context, stride=stride)
    if not processes.is_first:
        return
    rows = {
        way: {
            "nats": result.nats,
            "tokens": result.num_tokens,
            "words": result.num_words,
            "perplexity_per_token": result.per_token,
            "perplexity_per_word": result.per_word,
            "bits_per_byte": result.bits_per_byte,
        }
        for way, result in results.items()
    }
    if as_json:
        print_json(rows)
        return
    table = Table(title=escape(str(file)), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in ("read", "tokens", "per token", "words with <eos>", "per word", "bits per byte"):
        table.add_column(name, justify="left" if name == "read" else "right")
    for way, result in results.items():
        figures = (result.num_tokens, result.per_token, result.num_words, result.per_word, result.bits_per_byte)
        table.add_row(way, *(f"{x:,}" if isinstance(x, int) else f"{x:,.3f}" for x in figures))
    console.print(table)


def _bytes_of(file: Path) -> bytes:
    """The bytes of a file of plain text, as --data reads them; or of a pipe."""
    from retnet.data import find_documents

    if file.is_dir():
        raise ValueError(f"{file} is a folder; accepted: a file of text (--data reads folders)")
    if not file.is_file():
        return file.read_bytes()
    (document,) = find_documents(file.absolute())  # a file in this folder may be called stdlib
    return document.read()


def _run_tasks(
    model: str,
    tasks: list[str],
    device: str,
    options: dict[str, int | None],
    include_path: Path | None,
    samples: Path | None,
    as_json: bool,
    processes: Processes,
) -> None:
    if not processes.is_first:  # the harness shows its progress and warnings in every process
        os.environ["TQDM_DISABLE"] = "1"
        logging.disable(logging.WARNING)
    with needs("eval", "--tasks"):
        from lm_eval.tasks import TaskManager
    from retnet.eval.harness import RetNetLM, run_tasks

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    network = RetNetLM(model, device=device, processes=processes)
    found = run_tasks(network, tasks, task_manager=manager, log_samples=samples is not None, **options)
    if not processes.is_first:
        return
    if samples is not None:
        _write_samples(samples, found["samples"])
    results = found["results"]
    if as_json:
        print_json(results)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                table.add_row(escape(task), metric, f"{value:.4f}")
    console.print(table)


def _write_samples(file: Path, samples: Mapping[str, list[dict[str, object]]]) -> None:
    """One line of JSON per document and task."""
    from retnet.system.files import written_whole

    with written_whole(file) as lines:
        for task, documents in samples.items():
            for document in documents:
                line = json.dumps({"task": task, **document}, ensure_ascii=False, default=str)
                lines.write(line.encode("utf-8", "backslashreplace") + b"\n")
