"""Two tasks from books: the style of one author, and which author wrote an excerpt.

An example is a document of a fixed number of tokens after the document start. `style`: excerpts of one author, with the
loss on all tokens. `author`: an excerpt, a line that asks for its author, and a letter, with the loss on the letter.
Training, validation and test are excerpts of different books wherever the author has enough of them; the books of these
authors are not among those that the base model reads.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retnet.data.tokenizer import Tokenizer

IGNORED = -100
STYLE = {"train": ("967", "1023"), "valid": ("883",), "test": ("766",)}  # Dickens; Project Gutenberg's numbers
AUTHORS = {  # books of training, validation and test
    "Dickens": ("967", "883", "766"),
    "Tolstoy": ("2600", "2600", "1399"),
    "Dostoyevsky": ("8117", "2638", "2554"),
    "Darwin": ("944", "944", "2009"),
    "Gibbon": ("731", "731", "732"),
}
PARTS = ("train", "valid", "test")
QUESTION = "\nAuthor: "
_START, _END = "*** START OF", "*** END OF"


@dataclass(frozen=True)
class Examples:
    """ids [N, T] with the document start, labels [N, T] already shifted, answers: the tokens to choose among."""

    ids: Tensor
    labels: Tensor
    answers: tuple[int, ...] = ()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.ids), (size,), generator=generator)
        return self.ids[chosen], self.labels[chosen]


def read_books(archive: Path) -> dict[str, str]:
    """The texts of books.tar.xz by Project Gutenberg's number, without its headers."""
    books = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name).name
            if member.isfile() and name.startswith("pg"):
                content = files.extractfile(member)
                assert content is not None
                books[name[2:].split("_")[0]] = _body(content.read().decode("utf-8", "replace"))
    return books


def base_texts(books: dict[str, str]) -> list[str]:
    """The books of all other authors."""
    used = {number for numbers in (*STYLE.values(), *AUTHORS.values()) for number in numbers}
    return [text for number, text in sorted(books.items()) if number not in used]


def style(books: dict[str, str], tokenizer: Tokenizer, length: int, counts: Sequence[int]) -> dict[str, Examples]:
    """Excerpts of Dickens: so many per part."""
    return {
        part: _of([_excerpts(books[n], tokenizer, length - 1, -(-count // len(STYLE[part]))) for n in STYLE[part]],
                  tokenizer)
        for part, count in zip(PARTS, counts, strict=True)
    }  # fmt: skip


def authors(books: dict[str, str], tokenizer: Tokenizer, length: int, counts: Sequence[int]) -> dict[str, Examples]:
    """Excerpts with the letter of their author: so many per part, equally many of each author.

    A book of training and validation gives its first part to the one and its last tenth to the other.
    """
    question = tokenizer.encode(QUESTION)
    letters = [tokenizer.encode(QUESTION + chr(65 + i))[len(question) :] for i in range(len(AUTHORS))]
    assert all(len(letter) == 1 for letter in letters)
    found = {}
    for place, (part, count) in enumerate(zip(PARTS, counts, strict=True)):
        rows = []
        for letter, numbers in zip(letters, AUTHORS.values(), strict=True):
            text = books[numbers[place]]
            if numbers[0] == numbers[1] and part != "test":
                cut = len(text) // 10 * 9
                text = text[:cut] if part == "train" else text[cut:]
            excerpts = _excerpts(text, tokenizer, length - len(question) - 2, count // len(AUTHORS))
            rows += [[*tokens, *question, *letter] for tokens in excerpts]
        examples = _of([rows], tokenizer)
        labels = torch.full_like(examples.labels, IGNORED)
        labels[:, -2] = examples.labels[:, -2]
        found[part] = Examples(examples.ids, labels, tuple(letter[0] for letter in letters))
    return found


def _body(text: str) -> str:
    begin, end = text.find(_START), text.find(_END)
    begin = 0 if begin < 0 else text.index("\n", begin)
    return text[begin : end if end > 0 else None].replace("\r\n", "\n").strip()


def _excerpts(text: str, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """So many runs of tokens, evenly spread over a text; each begins at a word."""
    found, room = [], 8 * length
    for i in range(count):
        begin = text.index(" ", (len(text) - room) * i // count) + 1
        found.append(tokenizer.encode(text[begin : begin + room])[:length])
    return found


def _of(parts: Sequence[list[list[int]]], tokenizer: Tokenizer) -> Examples:
    ids = torch.tensor([[tokenizer.document_start, *row] for part in parts for row in part])
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    return Examples(ids, labels)
