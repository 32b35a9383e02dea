"""Settings of a server, beside those of its engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Settings:
    """Where the server listens, whom it serves, and its limits. Sizes are in bytes, times in seconds.

    api_key_file: lines of `name:key`, or `key`; None serves everyone.
    state_dir: where idle sessions go; None keeps them in memory only.
    allowed_hosts, allowed_origins: beside those of the address that the server is bound to.
    max_body: of a JSON request; max_upload: of an uploaded session.
    max_prompt_tokens: None for as many as the context holds. max_new_tokens: likewise.
    max_waiting: requests that wait for a slot, beyond which more are answered with 429; None: 4 per slot.
    rate: requests per minute per key, and concurrency: requests at a time per key; None for any number.
    timeout: of a request, from its first byte to the last of its response.
    grace: how long running requests may go on after SIGTERM.
    prefix_per_key: cached prefixes are shared by the requests of one key only.
    chat_template: plain, none, or a file; None for the model's own, otherwise plain. tool_format: hermes, or none; None
    for hermes if the template mentions its calls.
    session_memory, session_disk: budgets of all sessions; session_ttl: how long an unused session is kept.
    session_sync: responses wait until the session that they keep is on disk, for servers that share a folder.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    state_dir: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 16 * MIB
    max_upload: int = 4 * GIB
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_waiting: int | None = None
    rate: float | None = None
    concurrency: int | None = None
    timeout: float = 600.0
    grace: float = 30.0
    prefix_per_key: bool = True
    session_memory: int = GIB
    session_disk: int = 16 * GIB
    session_ttl: float = 24 * 3600.0
    session_sync: bool = False
    chat_template: str | None = None
    tool_format: str | None = None
    log_prompts: bool = False
    quiet: bool = False
