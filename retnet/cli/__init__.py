"""The `retnet` command: one file per verb.

`retnet --help` must answer at once, so a verb's file imports torch and everything heavy inside its function. A user's
error ends in one message and exit code 2; any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import typer

from retnet import __version__
from retnet.cli._common import Session, plain_warnings, report_error
from retnet.cli.chat import chat
from retnet.cli.check import check
from retnet.cli.convert import convert
from retnet.cli.data import data_app
from retnet.cli.eval import evaluate
from retnet.cli.generate import generate
from retnet.cli.info import info
from retnet.cli.serve import serve
from retnet.cli.stack import stack_app
from retnet.cli.train import train
from retnet.cli.tune import tune
from retnet.system.extras import MissingExtra

app = typer.Typer(
    name="retnet",
    help="Retentive networks: train in parallel, run in constant memory and time per token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


app.command()(train)
app.command()(generate)
app.command()(serve)
app.command()(chat)
app.command()(check)
app.command()(info)
app.command("eval")(evaluate)
app.command()(convert)
app.command()(tune)
app.add_typer(stack_app, name="stack")
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retnet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    context.obj.debug = debug


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0 success, 1 a failed check or a bug, 2 wrong input, 130 interrupted."""
    session = Session()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may have no characters in this encoding
    try:
        with plain_warnings():
            app(args=arguments, prog_name="retnet", obj=session)
    except (ValueError, OSError, MissingExtra) as error:
        if session.debug:
            raise
        report_error(error)
        sys.exit(2)
