"""Directories that transformers writes and reads: shards, dtypes, device maps, Auto classes, other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import retnet.hf
from retnet.data.tokenizer import ByteTokenizer
from retnet.layers.mixers import float32_parameters
from retnet.layers.retention import MultiScaleRetention
from retnet.models.directory import load_model, save_model
from retnet.models.hf import RetNetForCausalLM, RetNetModel
from retnet.models.hf.card import model_card
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import MTP, hf_model

from .conftest import STACKS, random_ids


def run_python(code: str, **environment: str) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("stack", "tied", "mtp"),
    [("both decays", True, None), ("both decays", False, MTP), ("hybrid", True, None)],
)
def test_shards_are_written_and_read_by_retnet_and_transformers(tmp_path, stack, tied, mtp):
    model = hf_model(stack, tie_embeddings=tied, mtp=mtp)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ids = random_ids(2, 7)
    again = RetNetForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(load_model(tmp_path)(ids).logits, model(ids).logits)
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    if mtp is not None:
        for read in (load_model(tmp_path), again.model):
            for name, weight in read.mtp.state_dict().items():
                assert torch.equal(weight, model.model.mtp.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_loaded_in_the_requested_dtype(saved, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    for name, parameter in model.named_parameters():
        is_rate = name.rpartition(".")[2] in float32_parameters()
        assert parameter.dtype == (torch.promote_types(dtype, torch.float32) if is_rate else dtype), name
    assert model.model.config.torch_dtype == dtype
    assert model(random_ids(1, 5)).logits.dtype == dtype


def test_a_model_saved_in_half_precision_comes_back_in_it(tmp_path):
    hf_model().bfloat16().save_pretrained(tmp_path)
    assert RetNetForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert RetNetForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_half_precision_decays_are_those_of_the_configuration(saved):
    """A gamma above 1 - 2^-8 would round to 1 in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    mixer = next(m for m in model.modules() if isinstance(m, MultiScaleRetention))
    decay = mixer.log_decay(torch.zeros(1, 1, 32, dtype=torch.bfloat16))
    assert decay.dtype == torch.float32
    torch.testing.assert_close(decay, mixer.config.log_decay.float())


def test_layers_can_be_offloaded_to_disk(saved, tmp_path):
    whole = RetNetForCausalLM.from_pretrained(saved)
    places = {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(len(whole.model.layers))}
    places |= {"model.embedding": "cpu", "model.final_norm": "cpu", "model.head": "cpu"}
    spread = RetNetForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)
    assert {p.device.type for p in spread.model.layers[1].parameters()} == {"meta"}
    ids = random_ids(2, 6)
    assert torch.equal(spread(ids).logits, whole(ids).logits)
    assert torch.equal(spread.generate(ids, max_new_tokens=4), whole.generate(ids, max_new_tokens=4))


def test_auto_classes_find_the_model(saved):
    assert isinstance(AutoConfig.from_pretrained(saved), retnet.hf.RetNetConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(saved), RetNetForCausalLM)
    body = AutoModel.from_pretrained(saved)
    assert type(body) is RetNetModel
    ids = random_ids(2, 5)
    hidden = body(ids).last_hidden_state
    logits = AutoModelForCausalLM.from_pretrained(saved)(ids).logits
    assert torch.equal(body.model.logits(hidden), logits)


@pytest.mark.parametrize(
    ("stack", "writer"),
    [
        ("both decays", "face"),
        *(pytest.param(s, w, marks=pytest.mark.slow) for s, w in [("both decays", "core"), ("hybrid", "face")]),
    ],
)
def test_a_fresh_process_loads_the_directory_through_its_shim(tmp_path, stack, writer):
    directory, again = tmp_path / "model", tmp_path / "again"
    model = hf_model(stack, tie_embeddings=True)
    model.save_pretrained(directory) if writer == "face" else save_model(model.model, directory)
    output = run_python(
        "import sys\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "assert 'retnet' not in sys.modules\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)\n"
        f"body = AutoModel.from_pretrained({str(directory)!r}, trust_remote_code=True)\n"
        "ids = model.generate(max_new_tokens=4, do_sample=False, pad_token_id=0)\n"
        "print(type(model).__module__, type(body).__name__, ids.tolist())\n"
        f"model.save_pretrained({str(again)!r})",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    expected = model.generate(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.strip() == f"retnet.models.hf.model RetNetModel {expected.tolist()}"
    # What such a process saves loads again in the same way, and copies none of our files.
    assert {p.name for p in again.glob("*.py")} == {"retnet_shim.py"}
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"] == "retnet_shim.RetNetConfig"


@pytest.mark.slow
def test_the_shim_is_refused_without_trust(tmp_path, saved):
    code = f"from transformers import AutoConfig\nAutoConfig.from_pretrained({saved!r}, trust_remote_code=False)"
    with pytest.raises(AssertionError, match="trust_remote_code"):
        run_python(code, HF_MODULES_CACHE=str(tmp_path))


def test_the_shim_is_ten_lines():
    from retnet.models.directory import SHIM

    assert len(SHIM.splitlines()) <= 10


def test_the_tokenizer_of_a_directory_is_that_of_bytes(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    for text in ("hello wörld\n\t x  y", "日本 🎉", "".join(map(chr, range(0x400)))):
        ids = tokenizer(text)["input_ids"]
        assert ids == ByteTokenizer().encode(text, start=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(byte_tokenizer()) == 257
    assert tokenizer(["a", "abc"], return_tensors="pt", padding=True)["attention_mask"].tolist() == [
        [0, 0, 1, 1],
        [1, 1, 1, 1],
    ]


def test_token_ids_that_a_library_sets_are_kept(tmp_path):
    model = hf_model()
    model.config.pad_token_id = 7
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.pad_token_id, config.bos_token_id) == (7, 256)


def test_the_model_card_says_what_the_model_is_and_how_to_load_it(saved):
    from huggingface_hub import ModelCard

    model = RetNetForCausalLM.from_pretrained(saved)
    card = ModelCard(model_card(model.model.config, license="apache-2.0", datasets=["tiny"]))
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["retnet", "linear-attention"]
    assert (card.data.license, card.data.datasets) == ("apache-2.0", ["tiny"])
    for fact in ("trust_remote_code=True", f"{len(model.model.layers)} layers", "257"):
        assert fact in card.text


@pytest.mark.parametrize("stack", STACKS)
def test_a_resized_vocabulary_is_saved(tmp_path, stack):
    model = hf_model(stack, tie_embeddings=True)
    ids = random_ids(1, 5)
    before = model(ids).logits
    model.resize_token_embeddings(300)
    torch.testing.assert_close(model(ids).logits[..., :257], before)
    model.save_pretrained(tmp_path)
    core = load_model(Path(tmp_path))
    assert core.config.vocab_size == 300
    assert torch.equal(core(ids).logits, model(ids).logits)
    assert model(ids, labels=torch.full_like(ids, 299)).loss.isfinite()
