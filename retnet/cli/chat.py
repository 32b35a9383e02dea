"""`retnet chat`: a conversation in a terminal, with a model in this process or with a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retnet.cli._common import console, load_shown
from retnet.cli._options import DEVICE_HELP, Drafts, MinP, Temperature, TopK, TopP

if TYPE_CHECKING:
    from retnet.cli.chat_turn import Backend

KEY_VARIABLE = "RETNET_API_KEY"
ENDLESS = 0


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|URL", help="Preset, stack file, saved directory, or a server's address.")
    ],
    system: Annotated[str | None, typer.Option(help="Message that every conversation begins with.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Tokens of an answer at most; 0 for any number.")] = 1024,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of the messages and the answer become less likely.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Model: Jinja file or plain; by default the model's own, otherwise plain.")
    ] = None,
    device: Annotated[str, typer.Option(help=f"Model: {DEVICE_HELP}")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="Model: dtype of the weights, such as bfloat16; by default as saved.")
    ] = None,
    speculate: Annotated[int, typer.Option(min=0, help="Model: draft tokens per step: 3, 7, 11, ...; 0 is off.")] = 0,
    drafts: Drafts = "auto",
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Server: file that holds an API key; by default ${KEY_VARIABLE}.")
    ] = None,
) -> None:
    """Talk with a model, or with a server of `retnet serve`. The next turn reads only its new text.

    Example: retnet chat out/demo
    """
    from retnet.cli.chat_terminal import Terminal

    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    limit = None if max_tokens == ENDLESS else max_tokens
    if model.startswith(("http://", "https://")):
        backend = _server(model, api_key_file, sampling, limit)
    else:
        backend = _local(model, chat_template, device, dtype, sampling, limit, (speculate, drafts))
    terminal = Terminal(backend, system)
    try:
        if load is not None:
            terminal.open(load)
        if terminal.interactive:
            console.print(f"[bold]{model}[/]  [dim]/help lists commands, Ctrl-D leaves[/]", highlight=False)
        terminal.run()
    finally:
        backend.close()


def _server(url: str, key_file: Path | None, sampling: dict[str, Any], max_tokens: int | None) -> Backend:
    from retnet.cli.chat_server import ServerBackend

    key = os.environ.get(KEY_VARIABLE) or None
    if key_file is not None:
        lines = key_file.read_text().split()
        if len(lines) != 1:
            raise ValueError(f"{key_file} holds {len(lines)} words; accepted: one API key, or name:key")
        key = lines[0].rpartition(":")[2]
    return ServerBackend(url, key, {**sampling, "max_tokens": max_tokens})


def _local(
    name: str,
    chat_template: str | None,
    device: str,
    dtype: str | None,
    sampling: dict[str, Any],
    max_tokens: int | None,
    speculate: tuple[int, str],
) -> Backend:
    from retnet.api import load_tokenizer
    from retnet.cli.chat_local import LocalBackend
    from retnet.data.chat_template import find_chat_template
    from retnet.models.decode.sampling import Sampling

    tokenizer = load_tokenizer(name)  # refused before the weights are loaded
    network = load_shown(name, device, dtype)
    template = find_chat_template(chat_template, tokenizer, network.directory)
    if template is None:
        raise ValueError("--chat-template is none, and a chat needs one; accepted: plain, or a file")
    return LocalBackend(network, tokenizer, template, Sampling(**sampling), max_tokens, *speculate)
