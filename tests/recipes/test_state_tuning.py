"""State tuning beside LoRA: the examples of the tasks, and the recipe at micro size."""

import io
import json
import tarfile

import pytest
import state_tuning
import torch
from state_tuning_tasks import AUTHORS, STYLE, authors, base_texts, read_books, style

from retnet.data.tokenizer import ByteTokenizer
from retnet.models.directory import save_model
from retnet.models.snapshot import Snapshot
from tests.small_models import BYTES, CONV, small_model

NUMBERS = sorted({number for numbers in (*STYLE.values(), *AUTHORS.values()) for number in numbers} | {"1"})


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A text of its own for every book, under the headers of Project Gutenberg."""
    path = tmp_path_factory.mktemp("books") / "books.tar.xz"
    with tarfile.open(path, "w:xz") as files:
        for number in NUMBERS:
            text = f"License\n*** START OF IT ***\r\n{f'book {number} says so ' * 200}\r\n*** END OF IT ***\nmore"
            entry = tarfile.TarInfo(f"books/train/pg{number}_title.txt")
            entry.size = len(text.encode())
            files.addfile(entry, io.BytesIO(text.encode()))
    return path


def test_the_base_model_reads_no_book_of_the_tasks(archive):
    (text,) = base_texts(read_books(archive))
    assert text == ("book 1 says so " * 200).strip()


def test_an_excerpt_of_a_style_is_predicted_whole(archive):
    examples = style(read_books(archive), ByteTokenizer(), 24, (4, 2, 2))["train"]
    assert examples.ids.shape == (4, 24)
    assert (examples.ids[:, 0] == 256).all()
    assert torch.equal(examples.labels[:, :-1], examples.ids[:, 1:])
    assert (examples.labels[:, -1] == -100).all()


def test_only_the_letter_of_an_author_is_predicted(archive):
    parts = authors(read_books(archive), ByteTokenizer(), 40, (10, 5, 5))
    examples = parts["test"]
    assert [bytes(row[-10:].tolist()) for row in examples.ids] == [
        b"\nAuthor: " + c for c in (b"A", b"B", b"C", b"D", b"E")
    ]
    assert examples.labels[:, -2].tolist() == [65, 66, 67, 68, 69] == list(examples.answers)
    assert (examples.labels != -100).sum() == 5


def test_the_recipe_writes_rows_a_table_and_states(archive, tmp_path, monkeypatch, capsys):
    small = state_tuning.Setting(length=40, counts=(10, 5, 5), steps=2, batch=2)
    monkeypatch.setattr(state_tuning, "SETTINGS", {"style": small, "author": small})
    monkeypatch.setattr(state_tuning, "RATES", {"state": (0.1,)})
    save_model(small_model([CONV], **BYTES), tmp_path / "model")
    words = ["--books", str(archive), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    state_tuning.main(["run", *words, "--methods", "none", "state"])
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("style", "author") for method in ("none", "state")
    ]
    assert all(row["accuracy"] is None or 0 <= row["accuracy"] <= 1 for row in rows)
    assert "| author | state |" in capsys.readouterr().out
    assert Snapshot.load(tmp_path / "out/style-0.1.safetensors").is_initial
