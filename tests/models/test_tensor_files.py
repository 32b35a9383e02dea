"""Tensors on disk: shards, pickles, damaged files, and the memory used for reading."""

from __future__ import annotations

import argparse
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.models.tensor_files import INDEX_FILE, WEIGHTS_FILE, Tensors, open_tensors, read_all, write_tensors


class Counter:
    """Stands for any object that a pickle could build by running code."""


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(4, 8, generator=generator),
        "b": torch.randn(16, generator=generator, dtype=torch.float64),
        "c": torch.randn(2, 3, 4, generator=generator).bfloat16(),
        "d": torch.randn((), generator=generator).half(),
        "e": torch.arange(5),
    }


def assert_same(read: Tensors, wanted: dict[str, torch.Tensor]) -> None:
    assert {name: (x.shape, x.dtype) for name, x in read.specs.items()} == {
        name: (x.shape, x.dtype) for name, x in wanted.items()
    }
    assert all(x.is_meta for x in read.specs.values())
    assert all(torch.equal(read.read(name), x) for name, x in wanted.items())


def test_one_file_if_all_fits(tmp_path, tensors):
    write_tensors(tmp_path, Tensors.of(tensors))
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert_same(open_tensors(tmp_path), tensors)
    assert_same(open_tensors(tmp_path / WEIGHTS_FILE), tensors)


@pytest.mark.parametrize(("shard_bytes", "count"), [(1, 5), (130, 3), (260, 2)])
def test_shards_with_an_index(tmp_path, tensors, shard_bytes, count):
    write_tensors(tmp_path, Tensors.of(tensors), shard_bytes=shard_bytes)
    shards = sorted(file for file in tmp_path.glob("*.safetensors"))
    assert [file.name for file in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file in shards:
        held = load_file(file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= shard_bytes
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_same(open_tensors(tmp_path), tensors)


def test_transformers_reads_the_shards(tmp_path, tensors):
    from transformers.utils.hub import get_checkpoint_shard_files

    write_tensors(tmp_path, Tensors.of(tensors), shard_bytes=130)
    files, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / INDEX_FILE))
    assert len(files) == 3
    assert set(metadata["weight_map"]) == set(tensors)


def test_saving_again_leaves_no_old_files(tmp_path, tensors):
    write_tensors(tmp_path, Tensors.of(tensors), shard_bytes=1)
    write_tensors(tmp_path, Tensors.of(tensors), shard_bytes=260)
    assert len(list(tmp_path.iterdir())) == 3
    write_tensors(tmp_path, Tensors.of({"a": tensors["a"]}))
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert_same(open_tensors(tmp_path), {"a": tensors["a"]})


def test_a_failed_save_leaves_the_checkpoint_before_it_whole(tmp_path, tensors):
    write_tensors(tmp_path, Tensors.of(tensors))

    def fail(name):
        if name == "c":
            raise RuntimeError("disk on fire")
        return torch.zeros_like(tensors[name])

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_tensors(tmp_path, Tensors(Tensors.of(tensors).specs, fail), shard_bytes=1)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert_same(open_tensors(tmp_path), tensors)


def test_written_files_are_readable_by_other_users(tmp_path, tensors):
    (tmp_path / "plain").touch()
    write_tensors(tmp_path, Tensors.of(tensors))
    assert (tmp_path / WEIGHTS_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_views_are_written_as_their_own_tensors(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path, Tensors.of({"t": whole.T, "row": whole[1]}))
    assert_same(open_tensors(tmp_path), {"t": whole.T, "row": whole[1]})


def test_read_all_converts_floats_alone_and_owns_its_memory(tmp_path, tensors):
    write_tensors(tmp_path, Tensors.of(tensors))
    read = read_all(open_tensors(tmp_path), dtype=torch.float16)
    assert {x.dtype for name, x in read.items() if name != "e"} == {torch.float16}
    assert read["e"].dtype == torch.int64
    mine = read_all(Tensors.of(tensors))
    mine["a"].zero_()
    assert tensors["a"].any()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_pickles_hold_tensors_or_tensors_beside_plain_values(tmp_path, tensors, key, legacy):
    extra = {"args": argparse.Namespace(width=4), "step": 7}
    whole = tensors if key is None else {key: tensors, **extra}
    torch.save(whole, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    read = open_tensors(tmp_path / "x.pt")
    assert_same(read, tensors)
    assert read.extra == ({} if key is None else extra)


def test_sharded_pickles(tmp_path, tensors):
    weight_map = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(tensors)}
    for name, file in weight_map.items():
        torch.save({name: tensors[name]}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(open_tensors(tmp_path), tensors)


def test_safetensors_are_preferred_to_pickles(tmp_path, tensors):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert_same(open_tensors(tmp_path), tensors)


def test_pickles_that_could_run_code_are_not_read(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "optimizer": Counter()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="could run code and is not read"):
        open_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 5, 60])
def test_damaged_files_are_reported(tmp_path, tensors, suffix, keep):
    file = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.\w+ is damaged"):
        open_tensors(file)


def test_files_without_a_state_dict_are_reported(tmp_path):
    for whole, message in (
        ({"a": 3}, "holds no state dict: 'a' is no tensor"),
        ({}, "holds no state dict: it is empty"),
        ([torch.zeros(1)], "holds a list; accepted: a state dict"),
    ):
        torch.save(whole, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path / "x.pt")


def test_missing_checkpoints_are_named(tmp_path, tensors):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        open_tensors(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"accepted model.safetensors, .*found none"):
        open_tensors(tmp_path)
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    assert_same(open_tensors(tmp_path), {"a": tensors["a"]})
    save_file({"a": tensors["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match=r"found one.safetensors, two.safetensors"):
        open_tensors(tmp_path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, tensors):
    write_tensors(tmp_path, Tensors.of(tensors), shard_bytes=1)
    index = json.loads((tmp_path / INDEX_FILE).read_text())

    def opened(weight_map: object) -> Tensors:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        return open_tensors(tmp_path)

    good = index["weight_map"]
    with pytest.raises(ValueError, match="disagree on where 1 tensors are, f for one"):
        opened(good | {"f": good["a"]})
    with pytest.raises(ValueError, match="disagree on where 1 tensors are, b for one"):
        opened(good | {"b": good["a"]})
    with pytest.raises(FileNotFoundError, match=r"names the shard gone.safetensors, which is missing"):
        opened(good | {"a": "gone.safetensors"})
    with pytest.raises(ValueError, match="accepted: a file beside it"):
        opened(good | {"a": "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="no index of shards"):
        opened([])
    assert_same(opened(good), tensors)


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    live: dict[int, int] = {}
    most = 0

    def read(name: str) -> torch.Tensor:
        nonlocal most
        x = torch.ones(1000)
        live[id(x)] = x.nbytes
        weakref.finalize(x, live.pop, id(x))
        most = max(most, sum(live.values()))
        return x

    specs = {f"x{i}": torch.empty(1000, device="meta") for i in range(12)}
    write_tensors(tmp_path, Tensors(specs, read), shard_bytes=12_000)
    assert most == 12_000
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
