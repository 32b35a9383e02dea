"""The `retnet` command: one file per verb.

`retnet --help` must answer at once, so a verb's file imports torch and everything heavy inside its function. A user's
error ends in one message and exit code 2; any other exception is a bug and shows its traceback.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from retnet import __version__
from retnet.cli._common import Session, plain_warnings, report_error
from retnet.cli.chat import chat
from retnet.cli.check import check
from retnet.cli.convert import convert
from retnet.cli.data import data_app
from retnet.cli.distil import distil
from retnet.cli.doctor import doctor
from retnet.cli.eval import evaluate
from retnet.cli.generate import generate
from retnet.cli.help_text import short_help
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
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


# By panel of `retnet --help`: verbs, and groups of verbs.
_PANELS: dict[str, dict[str, Callable[..., Any] | typer.Typer]] = {
    "Train and evaluate": {"data": data_app, "train": train, "distil": distil, "eval": evaluate, "check": check},
    "Generate and serve": {"generate": generate, "chat": chat, "serve": serve},
    "Models": {"info": info, "stack": stack_app, "convert": convert},
    "This machine": {"doctor": doctor, "tune": tune},
}
for _panel, _verbs in _PANELS.items():
    for _name, _verb in _verbs.items():
        if isinstance(_verb, typer.Typer):
            app.add_typer(_verb, name=_name, short_help=short_help(str(_verb.info.help)), rich_help_panel=_panel)
        else:
            app.command(_name, short_help=short_help(_verb), rich_help_panel=_panel)(_verb)


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
