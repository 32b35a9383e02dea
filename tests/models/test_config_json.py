"""One truth in config.json: a text ends at the same tokens for us and for transformers, whichever library wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import retnet.hf  # registers the classes  # noqa: F401
from retnet.models.config_json import token_ids_in_vocabulary
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import load_config, load_model, save_model
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import BYTES, hf_model, small_model

PROMPT = [256, 97, 98, 99]
GREEDY = Sampling(temperature=0)


def ours(directory: Path, count: int = 24) -> list[int]:
    engine = Engine(load_model(directory), num_slots=1, max_tokens=64)
    generation = engine.submit(Request(PROMPT, count, GREEDY))
    engine.run()
    return generation.tokens


def theirs(directory: Path, count: int = 24) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(PROMPT) :].tolist()


def change_json(file: Path, **values) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(data | values))


def trainer_aligned(directory: Path, ends: list[int]) -> None:
    """As Trainer does when the tokenizer has another end than the model: config one, generation_config both."""
    model = hf_model(eos_token_id=ends[1])
    model.config.eos_token_id = ends[0]
    model.generation_config.eos_token_id = ends
    model.save_pretrained(directory)


def outer_by_hand(directory: Path, ends: list[int]) -> None:
    save_model(small_model("both decays", **BYTES), directory)
    change_json(directory / "config.json", eos_token_id=ends)


def generation_by_hand(directory: Path, ends: list[int]) -> None:
    save_model(small_model("both decays", **BYTES, eos_token_id=1), directory)
    change_json(directory / "generation_config.json", eos_token_id=ends)


def natively(directory: Path, ends: list[int]) -> None:
    save_model(small_model("both decays", **BYTES, eos_token_id=tuple(ends)), directory)


def by_transformers(directory: Path, ends: list[int]) -> None:
    hf_model(eos_token_id=tuple(ends)).save_pretrained(directory)


def natively_after_transformers(directory: Path, ends: list[int]) -> None:
    trainer_aligned(directory / "first", ends)
    save_model(load_model(directory / "first"), directory)


WRITERS = [
    trainer_aligned, outer_by_hand, generation_by_hand, natively, by_transformers, natively_after_transformers,
]  # fmt: skip


@pytest.fixture(scope="module")
def free() -> list[int]:
    """Greedy tokens of the model without an end."""
    engine = Engine(small_model("both decays", **BYTES), num_slots=1, max_tokens=64)
    generation = engine.submit(Request(PROMPT, 24, GREEDY))
    engine.run()
    return generation.tokens


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("first", [0, 1], ids=["first end", "second end"])
def test_a_text_ends_where_transformers_ends_it_whichever_library_wrote_the_ends(tmp_path, write, first, free):
    never = next(token for token in range(256) if token not in free)
    end = next(token for token in free[4:] if token != free[0])
    write(tmp_path, [end, never] if first == 0 else [never, end])
    expected = free[: free.index(end) + 1]
    assert theirs(tmp_path) == expected
    assert ours(tmp_path) == expected


def test_ids_beside_model_config_win_and_null_leaves_those_inside(tmp_path):
    save_model(small_model(**BYTES, eos_token_id=5), tmp_path)
    change_json(tmp_path / "config.json", eos_token_id=None, bos_token_id=7, pad_token_id=9)
    config = load_config(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, 5, 9)
    change_json(tmp_path / "generation_config.json", eos_token_id=[8, 8, 6], pad_token_id=-1)
    config = load_config(tmp_path)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (7, (8, 6), None)


def test_saving_over_an_earlier_model_leaves_none_of_its_ends(tmp_path):
    hf_model(eos_token_id=(5, 6)).save_pretrained(tmp_path)
    change_json(tmp_path / "generation_config.json", temperature=0.7)
    save_model(small_model("both decays", **BYTES, eos_token_id=9), tmp_path)
    assert load_config(tmp_path).eos_token_ids == (9,)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 9
    save_model(small_model("both decays", **BYTES), tmp_path)
    assert load_config(tmp_path).eos_token_ids == ()
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.7


def test_several_ends_survive_saving(tmp_path):
    model = small_model(eos_token_id=(3, 4))
    save_model(model, tmp_path)
    assert load_config(tmp_path) == model.config
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [3, 4]


@pytest.mark.parametrize("value", ["2", 2.5, True, [1, "2"], [[1]], {"id": 1}])
def test_a_token_id_that_is_no_integer_is_named_with_its_file(tmp_path, value):
    save_model(small_model(), tmp_path)
    change_json(tmp_path / "config.json", eos_token_id=value)
    with pytest.raises(ValueError, match=r"config.json: eos_token_id is .*; accepted: an integer, a list of integers"):
        load_config(tmp_path)
    change_json(tmp_path / "config.json", eos_token_id=None)
    change_json(tmp_path / "generation_config.json", eos_token_id=value)
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id is .*; accepted"):
        load_config(tmp_path)


def test_token_ids_beyond_the_vocabulary_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match="eos_token_id is .*, beyond the vocabulary of 61: ignored"):
        assert token_ids_in_vocabulary("eos_token_id", [60, 61], 61) == (60,)
    with pytest.warns(UserWarning, match="pad_token_id is 61"):
        assert token_ids_in_vocabulary("pad_token_id", 61, 61) is None


def test_the_dtype_of_a_configuration_is_that_of_the_weights(tmp_path):
    save_model(small_model().bfloat16(), tmp_path / "native")
    hf_model().to(torch.bfloat16).save_pretrained(tmp_path / "transformers")
    for name in ("native", "transformers"):
        assert load_config(tmp_path / name).dtype == "bfloat16"
        assert load_model(tmp_path / name).config.dtype == "bfloat16"
    data = json.loads((tmp_path / "native" / "config.json").read_text())
    assert data["dtype"] == data["model_config"]["dtype"] == "bfloat16"


def test_integer_weights_are_no_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(small_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embedding.weight"] = weights["model.embedding.weight"].to(torch.int64)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embedding\.weight is torch\.int64, not floating-point"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [None, 5, [], "x"])
def test_a_model_config_that_is_no_mapping_is_refused(tmp_path, value):
    save_model(small_model(), tmp_path)
    change_json(tmp_path / "config.json", model_config=value)
    with pytest.raises(ValueError, match=r"config.json: config: expected a mapping"):
        load_config(tmp_path)
