"""Indexes of sharded tensors: what was written is read, and everything else is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retnet.models import shards
from retnet.models.directory import load_model, save_model, write_model_config
from retnet.models.shards import (
    SHARDS_FILE,
    WEIGHTS,
    Part,
    ShardedTensor,
    Shards,
    open_shards,
    read_box,
    shard_file,
    write_index,
)
from tests.small_models import small_model

A, B = shard_file(0, 0), shard_file(1, 0)
MATRIX = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A matrix in two parts, by rows, a scalar and an empty tensor."""
    save_file({"matrix": MATRIX[:3].clone(), "scalar": torch.tensor(7)}, tmp_path / A)
    save_file({"matrix": MATRIX[3:].clone()}, tmp_path / B)
    tensors = {
        "matrix": ShardedTensor(torch.float32, (4, 3), (Part(A, (0, 0), (3, 3)), Part(B, (3, 0), (1, 3)))),
        "scalar": ShardedTensor(torch.int64, (), (Part(A, (), ()),)),
        "empty": ShardedTensor(torch.bfloat16, (0, 5), ()),
    }
    write_index(tmp_path, tensors)
    return tmp_path


def test_tensors_are_read_whole_and_in_boxes(saved):
    opened = open_shards(saved)
    assert torch.equal(opened.read("matrix"), MATRIX)
    assert opened.read("scalar").item() == 7
    assert opened.read("empty").shape == (0, 5)
    with opened.opened(A) as stream:
        assert torch.equal(read_box(stream, "matrix", (1, 1), (2, 1)), MATRIX[1:3, 1:2])
        assert read_box(stream, "scalar", (), ()).item() == 7


def change(entry: str, **values):
    def changed(data):
        data["tensors"][entry] |= values

    return changed


def change_part(number: int, **values):
    def changed(data):
        data["tensors"]["matrix"]["parts"][number] |= values

    return changed


def remove_part(data):
    del data["tensors"]["matrix"]["parts"][1]


def repeat_part(data):
    data["tensors"]["matrix"]["parts"].append(data["tensors"]["matrix"]["parts"][0])


def rename(data):
    data["tensors"]["other"] = data["tensors"].pop("scalar")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("matrix", shape=[4, 4]), r"'matrix': its parts have 12 elements of 16: a part is missing"),
        (change("matrix", shape=[3, 3]), r"'matrix': the part \[3, 0\] to \[4, 3\] is outside of the shape \[3, 3\]"),
        (change("matrix", shape=[float("nan"), 3]), r"shape \[nan, 3\]; accepted: at most 16 integers"),
        (change("matrix", shape=[-1, 3]), r"shape \[-1, 3\]; accepted"),
        (change("matrix", shape=[True, 3]), r"shape \[True, 3\]; accepted"),
        (change("matrix", shape=[2**61, 2**61]), r"shape .*; accepted"),
        (change("matrix", shape=[10**400]), r"shape .*; accepted"),
        (change("matrix", shape=[1] * 17), r"shape .*; accepted"),
        (change("matrix", shape="43"), r"shape '43'; accepted"),
        (change("matrix", dtype="F33"), r"its dtype is 'F33'; accepted: F64, "),
        (change("matrix", dtype=["F32"]), r"its dtype is \['F32'\]; accepted"),
        (change("matrix", dtype="BF16"), r"holds torch.float32 \[3, 3\] of matrix, .* says torch.bfloat16 \[3, 3\]"),
        (change("matrix", parts=None), r"its parts are None; accepted: a list"),
        (change("matrix", code="x"), r"accepted: a mapping of \['dtype', 'parts', 'shape'\]"),
        (change("empty", shape=[1, 5]), r"'empty': its parts have 0 elements of 5: a part is missing"),
        (change_part(1, offset=[2, 0]), r"the part at \[2, 0\] overlaps another"),
        (change_part(1, offset=[3, 1]), r"is outside of the shape"),
        (change_part(1, offset=[3]), r"offset \[3\] and shape \[1, 3\]; accepted: as many axes"),
        (change_part(1, shape=[0, 3]), r"shape \[0, 3\]; accepted: as many axes, not empty"),
        (change_part(0, shape=[2, 3]), r"its parts have 9 elements of 12: a part is missing"),
        (change_part(1, file=A), r"two parts are in one file"),
        (change_part(1, file=shard_file(2, 0)), r"names the file shard-00002-00000.safetensors, which is missing"),
        *(
            (change_part(1, file=name), r"a part is in the file .*; accepted: names like shard-00000-00000.safetensors")
            for name in (
                f"../{B}", f"/tmp/{B}", f"sub/{B}", f"{B}\n", f"{B}\0", "model.safetensors", "", None, [B],
                "shard-0000\u0661-00000.safetensors",
            )
        ),
        (remove_part, r"its parts have 9 elements of 12: a part is missing"),
        (repeat_part, r"two parts are in one file"),
        (rename, r"holds nothing of other, and .* says torch.int64 \[\]|holds torch.int64 \[\] of scalar"),
        (lambda data: data["tensors"].pop("scalar"), r"holds torch.int64 \[\] of scalar, and .* says nothing"),
        (lambda data: data.update(tensors=[]), r"\[\] given; accepted: a mapping"),
        (lambda data: data.update(format="retnet-shards-9"), r"of format 'retnet-shards-9'; accepted: retnet-shards-1"),
        (lambda data: data.update(more=1), r"with tensors alone"),
    ],
)  # fmt: skip
def test_an_index_that_is_not_of_its_files_is_refused(saved, damage, message):
    file = saved / SHARDS_FILE
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises((ValueError, OSError), match=message):
        open_shards(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "is a JSON list; accepted: an object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (pickle.dumps({"format": "retnet-shards-1", "tensors": {}}), "is not JSON"),
    ],
    ids=["list", "torn", "no text", "deep", "pickle"],
)
def test_an_index_that_is_no_json_object_is_refused(saved, content, message):
    (saved / SHARDS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_shards(saved)


def test_an_index_larger_than_any_run_writes_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"bytes; accepted: 100 or fewer"):
        open_shards(saved)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"matrix": [1.0]}))


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def other_shape(path: Path) -> None:
    save_file({"matrix": torch.zeros(3, 1)}, path)


def more_tensors(path: Path) -> None:
    save_file({"matrix": torch.zeros(1, 3), "more": torch.zeros(1)}, path)


def no_file(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "is damaged or not a safetensors file"),
        (huge_header, "is damaged or not a safetensors file"),
        (short, "is damaged or not a safetensors file"),
        (other_shape, r"holds torch.float32 \[3, 1\] of matrix, and shards.json says torch.float32 \[1, 3\]"),
        (more_tensors, r"holds torch.float32 \[1\] of more, and shards.json says nothing"),
        (no_file, "which is missing"),
    ],
)
def test_a_file_that_is_not_of_its_index_is_refused(saved, damage, message):
    damage(saved / B)
    with pytest.raises((ValueError, OSError), match=message):
        open_shards(saved)


def test_an_index_that_would_not_be_read_is_not_written(tmp_path):
    hole = ShardedTensor(torch.float32, (4,), (Part(A, (0,), (3,)),))
    with pytest.raises(ValueError, match="a part is missing"):
        write_index(tmp_path, {"x": hole})
    with pytest.raises(ValueError, match=r"x is of torch.complex64; accepted: torch.float64"):
        write_index(tmp_path, {"x": ShardedTensor(torch.complex64, (0,), ())})
    assert not (tmp_path / SHARDS_FILE).exists()


def test_parts_cut_along_two_axes_cover_a_tensor_or_not(tmp_path):
    whole = torch.arange(64.0).reshape(8, 8)
    parts = []
    for process, (row, column) in enumerate((r, c) for r in range(0, 8, 2) for c in range(0, 8, 4)):
        parts.append(Part(shard_file(process, 0), (row, column), (2, 4)))
        save_file({"x": whole[row : row + 2, column : column + 4].contiguous()}, tmp_path / parts[-1].file)
    write_index(tmp_path, {"x": ShardedTensor(torch.float32, (8, 8), tuple(parts))})
    assert torch.equal(open_shards(tmp_path).read("x"), whole)
    moved = Part(parts[0].file, (1, 4), (2, 4))
    with pytest.raises(ValueError, match="overlaps another"):
        write_index(tmp_path, {"x": ShardedTensor(torch.float32, (8, 8), (moved, *parts[1:]))})


def test_a_sharded_checkpoint_loads_as_a_model(tmp_path):
    model = small_model("hybrid")
    save_model(model, tmp_path / "whole")
    write_model_config(tmp_path, model)
    state = {f"{WEIGHTS}model.{name}": x for name, x in model.state_dict().items()}
    save_file(state | {"optimizer.model.step": torch.tensor(1.0)}, tmp_path / A)
    entries = {
        name: ShardedTensor(x.dtype, tuple(x.shape), (Part(A, (0,) * x.ndim, tuple(x.shape)),))
        for name, x in (state | {"optimizer.model.step": torch.tensor(1.0)}).items()
    }
    write_index(tmp_path, entries)
    loaded, whole = load_model(tmp_path), load_model(tmp_path / "whole")
    assert loaded.config == whole.config
    assert all(torch.equal(x, whole.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert isinstance(open_shards(tmp_path), Shards)
