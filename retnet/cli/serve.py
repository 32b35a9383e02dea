"""`retnet serve`: a model behind OpenAI's API, with sessions and a page."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet import __version__
from retnet.cli._common import console, errors, load_shown, silent
from retnet.cli._options import Device, Drafts, Int8, Model, Speculate, WeightDtype
from retnet.system.extras import require
from retnet.system.progress import Progress
from retnet.system.sizes import format_bytes, parse_bytes, quantity

if TYPE_CHECKING:
    from retnet.serve.http.service import Service

SIZE = "SIZE"
COMPARED = (8192, 131_072)  # tokens, for the memory of a KV cache


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Requests that run at a time: 1, 4, 8, ...; 4 on a CPU, 16 on a GPU.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar=SIZE, help="In place of --slots: memory of all slots, such as 8GiB.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest context; needed where a layer's cache grows, otherwise any length."),
    ] = None,
    device: Device = "auto",
    dtype: WeightDtype = None,
    int8: Int8 = False,
    speculate: Speculate = 0,
    drafts: Drafts = "auto",
    deferred_writes: Annotated[
        int, typer.Option(help="Tokens that states may lag behind: 16, 32, 64; faster from 16 streams on a GPU.")
    ] = 0,
    prefix_cache: Annotated[
        str, typer.Option(metavar=SIZE, help="Memory for states after common beginnings of prompts; 0 is off.")
    ] = "1GiB",
    shared_prefixes: Annotated[
        bool,
        typer.Option(
            "--shared-prefixes", help="Share cached prefixes between API keys; by default each key has its own."
        ),
    ] = False,
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Learned initial state (train method=state) of all requests, or of those whose model is NAME; may be "
            "repeated.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a line `name:key` per API key; without it everyone is served.")
    ] = None,
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Listen beyond this machine without API keys.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Further name of this server, as in the Host header; may be repeated.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Further site whose page may use this server; may be repeated.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Folder for idle sessions, which then survive a restart.")
    ] = None,
    session_memory: Annotated[str, typer.Option(metavar=SIZE, help="Memory for sessions.")] = "1GiB",
    session_disk: Annotated[str, typer.Option(metavar=SIZE, help="Disk for sessions in --state-dir.")] = "16GiB",
    session_ttl: Annotated[float, typer.Option(min=1, help="Seconds that an unused session is kept.")] = 86400.0,
    session_sync: Annotated[
        bool,
        typer.Option(
            "--session-sync",
            help="Responses wait until their session is on disk: for servers that share --state-dir.",
        ),
    ] = False,
    max_body: Annotated[str, typer.Option(metavar=SIZE, help="Largest JSON request.")] = "16MiB",
    max_upload: Annotated[str, typer.Option(metavar=SIZE, help="Largest session that may be uploaded.")] = "4GiB",
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt; by default any.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest output.")] = 16384,
    max_waiting: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait for a slot; 4 per slot by default.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.01, help="Requests per minute per API key; any by default.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time per API key; any by default.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running requests have after SIGTERM.")] = 30.0,
    served_name: Annotated[
        str | None, typer.Option(help="Name of the model in the API; by default its directory's or preset's.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja file, plain or none; by default the model's own template, otherwise plain."),
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="Calls of tools: hermes or none; by default as the chat template says.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log warnings and errors only.")] = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page. Memory per stream does not grow with its length.

    Example: retnet serve out/demo --port 8000
    """
    if sys.platform == "win32":  # grammars are checked in a process with limits that only POSIX has
        raise ValueError("retnet serve runs on Linux and macOS; accepted on Windows: Linux in WSL 2")
    require("serve", "retnet serve")
    if int8:
        require("quantize", "--int8")

    from retnet.models.decode.int8 import quantize_int8_
    from retnet.serve.http.access.hosts import is_loopback
    from retnet.serve.http.access.log import configure_log
    from retnet.serve.http.app import create_app
    from retnet.serve.http.launch import EngineOptions, make_service
    from retnet.serve.http.run import bound_socket
    from retnet.serve.http.run import serve as run_server
    from retnet.serve.http.settings import Settings
    from retnet.stack.resolve import model_label

    if api_key_file is None and not allow_public and not is_loopback(host):
        raise ValueError(
            f"--host {host} lets other machines in, and there are no API keys; accepted: --api-key-file FILE, or "
            "--allow-public to serve everyone"
        )
    if slots is not None and memory is not None:
        raise ValueError("--slots and --memory are both given; accepted: one of the two")
    settings = Settings(
        host=host,
        port=port,
        api_key_file=api_key_file,
        state_dir=state_dir,
        allowed_hosts=tuple(allowed_host or ()),
        allowed_origins=tuple(allowed_origin or ()),
        max_body=_bytes("max-body", max_body),
        max_upload=_bytes("max-upload", max_upload),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_waiting=max_waiting,
        rate=rate,
        concurrency=concurrency,
        timeout=timeout,
        grace=grace,
        prefix_per_key=not shared_prefixes,
        session_memory=_bytes("session-memory", session_memory),
        session_disk=_bytes("session-disk", session_disk),
        session_ttl=session_ttl,
        session_sync=session_sync,
        chat_template=chat_template,
        tool_format=tool_format,
        log_prompts=log_prompts,
        quiet=quiet,
    )
    options = EngineOptions(
        slots=slots,
        memory=None if memory is None else _bytes("memory", memory),
        max_tokens=max_tokens,
        speculate=speculate,
        drafts=drafts,
        deferred_writes=deferred_writes,
        prefix_cache=_bytes("prefix-cache", prefix_cache, low=0),
    )
    name = served_name or model_label(model)
    states = _states(state or (), name)
    listener = bound_socket(host, port)
    try:
        from retnet.api import load_tokenizer

        tokenizer = load_tokenizer(model)  # refused before the weights are loaded
        network = load_shown(model, device, dtype, quiet=quiet)
        if int8:
            quantize_int8_(network)
        with Progress(silent if quiet else errors, "preparing the engine"):
            service = make_service(network, tokenizer, name, options, settings, states)
        app = create_app(service, settings)
        configure_log(quiet=quiet, prompts=log_prompts)
        address = _address(host, listener.getsockname()[1])

        def on_started() -> None:
            if not quiet:
                _greet(service, address)
            elif port == 0:  # nobody can know it otherwise
                print(address, flush=True)

        code = run_server(app, settings, listener, on_started)
    finally:
        listener.close()
    raise typer.Exit(code)


def _bytes(option: str, text: str, low: int = 1) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from error
    if size < low:
        raise ValueError(f"--{option} is {text}; accepted: at least {quantity(low, 'byte')}")
    return size


def _states(given: Sequence[str], served_name: str) -> dict[str, Path]:
    """The files of states by the name of the model in requests. Raises ValueError for a name that comes twice."""
    states: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or "/" in name:  # a path
            name, file = served_name, text
        if not name or not file:
            raise ValueError(f"--state is {text!r}; accepted: FILE, or NAME=FILE")
        if name in states:
            raise ValueError(
                f"--state has two files for {name!r}; accepted: one FILE for all requests, and one per further NAME"
            )
        states[name] = Path(file)
    return states


def _address(host: str, port: int) -> str:
    """The address of the server as a client on this machine writes it."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greet(service: Service, address: str) -> None:
    """Say where the server is, what a stream costs, and what to try first."""
    from retnet.models.cost import parameter_counts, transformer_cache_bytes

    config, pool, settings = service.engine.model.config, service.engine.pool, service.settings
    weight = service.engine.model.embedding.weight
    caches = ", ".join(
        f"{format_bytes(transformer_cache_bytes(config, context), 3)} at {context:,} tokens" for context in COMPARED
    )
    growth = "at any length" if service.context_limit is None else f"for {service.context_limit:,} tokens"
    body = json.dumps({"model": service.model_name, "prompt": "Once upon a time", "max_tokens": 50})
    key = "" if settings.api_key_file is None else " -H 'Authorization: Bearer YOUR_KEY'"
    curl = f"curl {address}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    total = parameter_counts(config)["total"]
    console.print(
        f"[bold]retnet {__version__}[/] serves [bold]{service.model_name}[/]: {total / 1e6:.4g}M parameters, "
        f"{str(weight.dtype)[6:]}, {weight.device}\n"
        f"[bold green]{address}[/]  page and API; /metrics, /health, /ready\n"
        f"{pool.num_slots} slots, {format_bytes(pool.cost.state, 3)} of state per stream {growth}; a Transformer's KV "
        f"cache of this width and depth: {caches}\n",
        highlight=False,
        soft_wrap=True,
    )
    if further := service.model_names[1:]:
        console.print(f"learned initial states, as models: {', '.join(further)}\n", highlight=False, markup=False)
    console.print(curl, highlight=False, soft_wrap=True, markup=False)
    console.print(f"retnet chat {address}\n", highlight=False, soft_wrap=True)
    if settings.api_key_file is None and settings.host not in ("127.0.0.1", "localhost", "::1"):
        errors.print("[yellow]warning:[/] anyone who reaches this address may use the server (--allow-public)")
