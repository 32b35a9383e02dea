"""Folders of texts and of shards, as tests write and compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from retnet.data import Corpus

SEPARATOR = "\n--\n"


def write_texts(folder: Path, articles: Sequence[str]) -> None:
    """A text file of the articles, and as many more as jsonl."""
    folder.mkdir()
    (folder / "a.txt").write_text(SEPARATOR.join(articles), encoding="utf-8")
    lines = "".join(json.dumps({"text": text[::-1]}) + "\n" for text in articles)
    (folder / "b.jsonl").write_text(lines, encoding="utf-8")


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder, or of one in a store: name -> bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.decode(corpus.tokens(document).tolist()) for document in range(len(corpus))]


def interrupt(progress: object) -> None:
    """What Ctrl-C does, for `on_progress`."""
    raise KeyboardInterrupt
