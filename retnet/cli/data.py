"""`retnet data`: write text as token shards, show their contents, check them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from retnet.cli._common import console, errors, print_json, unescape
from retnet.cli._options import AsJson, Force
from retnet.system.extras import MissingExtra, require
from retnet.system.outputs import check_new_file
from retnet.system.progress import BYTES
from retnet.system.progress import Progress as Shown
from retnet.system.sizes import format_count, quantity
from retnet.system.suggest import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    from retnet.data import Corpus
    from retnet.data.parts import PartResult
    from retnet.data.writing import Progress

WRITE = "write"
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True}
PLOT = "lengths.png"


class _WriteByDefault(TyperGroup):
    """`retnet data SOURCE... OUT` is `retnet data write SOURCE... OUT`, unless SOURCE is a verb mistyped."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"} and not self._is_mistyped(args[0]):
            args = [WRITE, *args]
        return super().parse_args(ctx, args)

    def _is_mistyped(self, word: str) -> bool:
        return word.isalpha() and nearest(word, self.commands) is not None and not Path(word).exists()


data_app = typer.Typer(
    cls=_WriteByDefault,
    help="Write text as token shards, show and check them.\n\nExample: retnet data my/texts tokens/mine",
    no_args_is_help=True,
)


@data_app.command(WRITE)
def write(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE... OUT",
            help="Files (text, jsonl, json, parquet; also .gz, .bz2, .xz and .zst), folders, 'stdlib', folders of "
            "save_to_disk, hf:NAME for a dataset of the Hugging Face hub; last, the folder to write. URLs such as "
            "s3://bucket/texts are files or folders too.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, a tokenizer.json, a folder with one, or a model of the hub.")
    ] = "bytes",
    document_start: Annotated[
        str | None, typer.Option(help="Special token before documents; by default bos, otherwise eos.")
    ] = None,
    with_end: Annotated[bool, typer.Option("--with-end", help="Also put the eos token after documents.")] = False,
    field: Annotated[
        str | None, typer.Option(help="Field with the text in jsonl, json, parquet and datasets; by default text.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help=r"Text between documents of a text file, such as '\n\n\n' or '<|end|>'."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset; by default train.")] = None,
    shard_size: Annotated[
        float | None,
        typer.Option(min=0.001, help="MiB of input per shard; by default a 256th of the total, 16 to 512."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N", help="Write the k-th of n shares of the shards, from 1; `retnet data merge OUT` joins them."
        ),
    ] = None,
) -> None:
    r"""Write text as token shards that keep documents apart, for `retnet train data=OUT`.

    A text file is one document unless --separator cuts it. OUT appears when all of it is on disk; until then the work
    is in OUT.partial, and the same command resumes an interrupted one there. Data that cannot be read is named by file
    and line, and nothing is left behind.

    With --shard, processes on any machines that see the sources and OUT share the work; the result has the same bytes.

    Example: retnet data wiki.txt tokens/wiki --separator '\n\n\n' --tokenizer gpt2/tokenizer.json
    """
    if len(paths) < 2:
        raise ValueError("accepted: retnet data SOURCE... OUT, one source at least and the folder to write")
    if separator == "":
        raise ValueError("--separator is empty; accepted: at least one character")

    from retnet.data.build import build_shards, partial_of
    from retnet.data.parts import Part, PartResult, write_part
    from retnet.data.plan import Settings
    from retnet.data.stores import StorePath, location

    *sources, out = paths
    part = Part(1, 1) if shard is None else Part.parse(shard)
    place = location(out)
    options = {
        "tokenizer": tokenizer,
        "document_start": document_start,
        "with_end": with_end,
        "settings": Settings(field, None if separator is None else unescape(separator), config, split),
        "shard_size": None if shard_size is None else int(shard_size * 2**20),
        "workers": workers,
    }
    began = time.perf_counter()
    try:
        with _progress() as show_progress:
            if shard is None and not isinstance(place, StorePath):
                written = build_shards(sources, place, **options, on_progress=show_progress)
            else:
                written = write_part(sources, out, part, **options, on_progress=show_progress)
        manifest = _merge(out) if shard is None and isinstance(written, PartResult) else written
    except KeyboardInterrupt:
        errors.print("[dim]interrupted; the same command resumes from here[/]")
        raise
    except OSError:
        if isinstance(place, Path) and (partial := partial_of(place)).exists():
            way_on = f"finished shards are kept in {escape(str(partial))}: once there is room, the same command resumes"
            errors.print(f"[dim]{way_on}[/]", soft_wrap=True)
        raise
    seconds = time.perf_counter() - began
    if isinstance(manifest, PartResult):
        console.print(f"{escape(out)}: part {shard}: {_describe_part(manifest)}; {seconds:.1f} s", **_PLAIN)
        return
    rate = manifest["bytes"] / 1e6 / seconds
    console.print(f"{escape(out)}: {_describe(manifest)}; {seconds:.1f} s ({rate:.1f} MB/s)", **_PLAIN)


@data_app.command()
def merge(out: Annotated[str, typer.Argument(help="OUT of the parts, a folder or a URL.")]) -> None:
    """Join the parts that `retnet data SOURCE... OUT --shard k/n` wrote, compared with their SHA-256.

    Example: retnet data merge tokens/wiki
    """
    console.print(f"{escape(out)}: {_describe(_merge(out))}", **_PLAIN)


@data_app.command()
def show(
    source: Annotated[str, typer.Argument(help="A folder that `retnet data` wrote; or text, read as bytes.")],
    samples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
    length: Annotated[int, typer.Option(min=1, help="Tokens to show of each.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed that chooses the documents.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"File for a plot of the document lengths; {PLOT} in a folder of shards by default."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Show a corpus: counts, document lengths as numbers and as a plot, and some decoded documents.

    Example: retnet data show tokens/wiki --samples 1
    """
    if plot is not None:
        require("plots", "--plot")
        check_new_file(plot, force=force)

    import numpy as np

    from retnet.data import open_corpus
    from retnet.data.shuffle import make_key, permute

    corpus = open_corpus(source)
    wanted = np.arange(min(samples, len(corpus)))
    chosen = [int(document) for document in permute(wanted, len(corpus), make_key("samples", seed))]
    stops = {document: min(length, int(corpus.lengths[document])) for document in chosen}
    texts = {document: corpus.decode(corpus.tokens(document, 0, stop).tolist()) for document, stop in stops.items()}
    if as_json:
        documents = [
            {"document": d, "from": corpus.describe(d), "tokens": int(corpus.lengths[d]), "text": texts[d]}
            for d in chosen
        ]
        picture = _draw(corpus, source, plot)
        print_json(_summary(corpus) | {"plot": None if picture is None else str(picture), "samples": documents})
        return
    summary = _summary(corpus)
    width = max(map(len, summary)) + 2
    for name, value in summary.items():  # not a table, which cuts hashes off at the edge of the terminal
        text = f"{value:,}" if isinstance(value, int) else str(value)
        console.print(f"[bold]{name.replace('_', ' '):<{width}}[/]{escape(text)}", soft_wrap=True)
    for document in chosen:
        place = f"{corpus.describe(document)}, {corpus.lengths[document]:,} tokens"
        console.print(f"\n[bold]document {document:,}[/] [dim]{escape(place)}[/]", soft_wrap=True, highlight=False)
        console.print(escape(texts[document]), soft_wrap=True, highlight=False)
    if picture := _draw(corpus, source, plot):
        console.print(f"\n[dim]document lengths plotted in {escape(str(picture))}[/]", soft_wrap=True)


@data_app.command()
def check(directory: Annotated[Path, typer.Argument(help="A folder that `retnet data` wrote.")]) -> None:
    """Read every file and compare it with the manifest's SHA-256; exit code 1 if anything is damaged.

    Example: retnet data check tokens/wiki
    """
    from retnet.data.shards import ShardFolder, check_shards

    problems = []
    shards = 0
    with Shown(errors, "checking", len(ShardFolder(directory).shards), "shards") as shown:
        for _, problem in check_shards(directory):
            shards += 1
            problems += [problem] if problem else []
            shown.advance()
    for problem in problems:
        errors.print(f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)
    console.print(f"{escape(str(directory))}: {quantity(shards, 'shard')}, all as written", soft_wrap=True)


def _describe(manifest: dict[str, Any]) -> str:
    return (
        f"{quantity(manifest['documents'], 'document')}, {format_count(manifest['tokens'])} tokens, "
        f"{manifest['bytes'] / 1e6:,.2f} MB of text in {quantity(len(manifest['shards']), 'shard')}"
    )


def _describe_part(result: PartResult) -> str:
    before = result.shards - result.written
    there = f" ({before} more {'was' if before == 1 else 'were'} there)" if before else ""
    return (
        f"{quantity(result.written, 'shard')} written{there}, of {result.all_shards} in all parts; "
        f"{quantity(result.counts.documents, 'document')}, {format_count(result.counts.tokens)} tokens"
    )


def _merge(out: str) -> dict[str, Any]:
    from retnet.data.merge import merge_parts

    with Shown(errors, "checking", None, "shards") as shown:
        return merge_parts(out, lambda done, total: shown.update(done, total=total))


def _draw(corpus: Corpus, source: str, plot: Path | None) -> Path | None:
    """Plot the lengths into `plot`, or into a folder of shards if it can be written; otherwise a note."""
    from retnet.data.corpus import ByteCorpus

    if plot is None and isinstance(corpus, ByteCorpus):
        return None
    path = Path(source) / PLOT if plot is None else plot
    try:
        from retnet.data.lengths_plot import save_lengths_plot
        from retnet.plots.frame import facts

        under = facts(quantity(len(corpus), "document"), f"{corpus.num_tokens:,} tokens", corpus.tokenizer_id)
        save_lengths_plot(corpus.lengths, f"Document lengths of {source}", under, path)
    except MissingExtra as error:
        errors.print(f"[dim]{escape(str(error))}[/]", soft_wrap=True)
        return None
    except OSError as error:
        if plot is not None:
            raise
        reason = escape(f"{path}: {error.strerror or error}")
        errors.print(f"[dim]no plot of the lengths in {reason} (--plot names another file)[/]", soft_wrap=True)
        return None
    return path


def _summary(corpus: Corpus) -> dict[str, int | float | str]:
    import numpy as np

    ranks = {"shortest": 0, "median": 50, "90th percentile": 90, "longest": 100}
    lengths = np.percentile(corpus.lengths, list(ranks.values()), method="nearest")
    return {
        "documents": len(corpus),
        "tokens": corpus.num_tokens,
        "bytes": corpus.num_bytes,
        "bytes_per_token": round(corpus.num_bytes / max(corpus.num_targets, 1), 3),
        "vocabulary": corpus.vocab_size,
        "tokenizer": corpus.tokenizer_id,
        **{f"{name} document": int(length) for name, length in zip(ranks, lengths)},
        "fingerprint": corpus.fingerprint,
    }


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Shows how much of the sources is written."""
    with Shown(errors, "looking for files") as shown:
        begun = False

        def show_progress(progress: Progress) -> None:
            nonlocal begun
            size, documents, tokens = progress.counts
            if not begun:
                shown.begin("writing", progress.size, BYTES, done=size)
                begun = True
            notes = (f"{tokens / 1e6:,.1f}M tokens", quantity(documents, "document"))
            shown.update(size, total=progress.size, notes=notes)

        yield show_progress
