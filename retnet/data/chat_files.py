"""Chat templates of a model directory, and the names that its configuration gives to special tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet.system.files import read_json, written_whole

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT = "default"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatFiles:
    """templates: name -> Jinja source; the usual one is `default`. special: such as bos_token -> its spelling."""

    templates: dict[str, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)


def read_chat_files(directory: Path) -> ChatFiles:
    """The templates in tokenizer_config.json and in files of their own, which take precedence, as in transformers.

    Raises ValueError for a template that is not text.
    """
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    templates = _templates_of(config.get("chat_template"), directory / CONFIG_FILE)
    if (directory / TEMPLATE_FILE).is_file():
        templates[DEFAULT] = _text_of(directory / TEMPLATE_FILE)
    for file in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[file.stem] = _text_of(file)
    special = {name: content for name in NAMES if (content := _spelling(config.get(name)))}
    return ChatFiles(templates, special)


def copy_templates(source: Path, target: Path) -> None:
    """Copy the templates that are files of their own."""
    for file in (source / TEMPLATE_FILE, *(source / TEMPLATE_FOLDER).glob("*.jinja")):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            with written_whole(copy) as written:
                written.write(file.read_bytes())


def _templates_of(given: Any, file: Path) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    named = isinstance(given, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in given
    )
    if not named:
        raise ValueError(f"{file}: chat_template is neither text nor a list of objects with 'name' and 'template'")
    return {entry["name"]: entry["template"] for entry in given}


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def _spelling(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
