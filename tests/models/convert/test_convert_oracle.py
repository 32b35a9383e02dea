"""Other implementations' own outputs, reproduced: logits in every mode and with a cache, gradients, hidden states."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from retnet.models import convert
from retnet.models.convert import torchscale
from retnet.models.decode.generation import generate
from retnet.models.lm import LanguageModel
from tests.paths import SHARED

from . import peers

ORACLE = SHARED / "oracle"
MODES = ("parallel", "recurrent", "chunkwise")

pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason="the reference outputs are not on this machine")


def difference(x: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    return ((x - reference).abs().max() / reference.abs().max()).item()


def in_mode(model: LanguageModel, mode: str) -> LanguageModel:
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, mode=mode, chunk_size=7 if mode == "chunkwise" else None))
        for layer in model.config.layers
    )
    other = LanguageModel(replace(model.config, layers=layers))
    other.load_state_dict(model.state_dict())
    return other.eval()


def cached(model: LanguageModel, ids: Tensor, prefill: int) -> Tensor:
    """Logits of a prefill, then of one token at a time."""
    out = model(ids[:, :prefill], carry=True)
    logits, state = [out.logits], out.state
    for t in range(prefill, ids.shape[1]):
        out = model(ids[:, t : t + 1], state, carry=True, in_place=True)
        logits, state = [*logits, out.logits], out.state
    return torch.cat(logits, 1)


def greedy(model: LanguageModel, prompt: Tensor, count: int) -> Tensor:
    return torch.cat([prompt, torch.stack(list(generate(model, prompt, count, temperature=0)), 1)], 1)


@pytest.fixture(scope="module")
def torchscale_file() -> dict[str, Tensor]:
    return load_file(ORACLE / "torchscale_small.safetensors")


def load_torchscale(tensors: dict[str, Tensor]) -> LanguageModel:
    args = json.loads((ORACLE / "torchscale_small.json").read_text())["config"]
    return convert.load(
        {n.removeprefix("state."): x for n, x in tensors.items() if n.startswith("state.")}, config=args
    )


def load_source(name: str, torchscale_file: dict[str, Tensor]) -> LanguageModel:
    return load_torchscale(torchscale_file) if name == "torchscale" else convert.load(ORACLE / "syncdoth_small_hf")


@pytest.mark.parametrize("source", ["torchscale", "syncdoth"])
@torch.no_grad()
def test_torchscale_and_syncdoth_logits_in_every_mode_and_cached(source, torchscale_file):
    model = load_source(source, torchscale_file)
    ids = torchscale_file["ids"]
    theirs = load_file(ORACLE / f"{source}_small.safetensors")
    for mode in MODES:
        ours = in_mode(model, mode)
        for form in ("parallel", "recurrent"):
            assert difference(ours(ids).logits, theirs[f"logits.{form}.f32"]) < 3e-6
            assert difference(cached(ours, ids, 13), theirs[f"logits.{form}.f32"]) < 3e-6
            assert difference(ours.double()(ids).logits, theirs[f"logits.{form}.f64"]) < 1e-13
            assert difference(cached(ours, ids, 13), theirs[f"logits.{form}.f64"]) < 1e-13
            ours.float()


@torch.no_grad()
def test_syncdoth_left_padding(torchscale_file):
    theirs = load_file(ORACLE / "syncdoth_small.safetensors")
    model = load_source("syncdoth", torchscale_file).double()
    mask = theirs["leftpad.mask"].bool()
    ours = model(theirs["leftpad.ids"], mask=mask).logits
    unpadded = mask.all(1)
    assert unpadded.any()
    assert difference(ours[unpadded], theirs["leftpad.logits.parallel.f64"][unpadded]) < 1e-13
    # Their positions count padding, ours do not. Rotary and decay are relative, so a shifted row gives the same logits.
    assert difference(ours[mask], theirs["leftpad.logits.parallel.f64"][mask]) < 1e-13


def test_torchscale_gradients_and_hidden_states(torchscale_file):
    model = load_torchscale(torchscale_file).double()
    ids = torchscale_file["ids"]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert abs(loss.item() - torchscale_file["loss.f64"].item()) < 1e-14
    parameters = dict(model.named_parameters())
    checked = 0
    for i in range(len(model.layers)):
        for ours, theirs in torchscale.NAMES.items():
            name = ours.format(i)
            if name in parameters:
                wanted = torchscale_file["grad." + theirs.format(i)].double()
                assert difference(parameters.pop(name).grad, wanted) < 2e-7, name  # stored rounded to float32
                checked += 1
    assert not parameters
    assert checked == sum(name.startswith("grad.") for name in torchscale_file)

    hidden = {}
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: hidden.update({i + 1: out[0]}))
    model(ids)
    for i, x in hidden.items():
        assert difference(x, torchscale_file[f"inner.hidden{i}"]) < 1e-13


def test_torchscale_greedy_continuation(torchscale_file):
    model = load_torchscale(torchscale_file).double()
    wanted = torchscale_file["greedy.recurrent.f64"]
    prompt = wanted[:, : wanted.shape[1] - 32]
    assert torch.equal(prompt, torchscale_file["ids"][:, : prompt.shape[1]])
    assert torch.equal(greedy(model, prompt, 32), wanted)


@torch.no_grad()
def test_fla_logits_in_every_mode_and_cached():
    theirs = load_file(ORACLE / "fla_golden_cpu.safetensors")
    model = convert.load(ORACLE / "fla_hf_cpu")
    ids = theirs["ids"]
    for mode in MODES:
        ours = in_mode(model, mode)
        for kernel in ("chunk", "fused_recurrent", "parallel", "decode_token_by_token"):
            assert difference(ours(ids).logits, theirs[f"logits.{kernel}.f32"]) < 5e-6
        assert difference(cached(ours, ids, 80), theirs["logits.prefill80_then_decode.f32"]) < 5e-6
        assert difference(ours.double()(ids).logits, theirs["logits.naive.f64"]) < 1e-13
        assert difference(cached(ours, ids, 0), theirs["logits.naive.f64"]) < 1e-13


@torch.no_grad()
def test_fla_packs_pads_states_and_generation():
    theirs = load_file(ORACLE / "fla_golden_cpu.safetensors")
    model = convert.load(ORACLE / "fla_hf_cpu")
    state = model(theirs["ids"], carry=True).state
    for i, layer in enumerate(state):
        assert difference(layer.memory, theirs[f"decode_state.layer{i}.f32"]) < 5e-6
    model.double()
    packed = model(theirs["packed.ids"], cu_seqlens=theirs["packed.cu_seqlens"]).logits
    assert difference(packed, theirs["packed.logits.naive.f64"]) < 1e-13
    mask = theirs["leftpad.mask"].bool()
    padded = model(theirs["leftpad.ids"], mask=mask).logits
    assert difference(padded[mask], theirs["leftpad.logits.naive.f64"][mask]) < 1e-13
    wanted, prompt = theirs["generate.naive.f64"], theirs["prompt"]
    assert torch.equal(greedy(model, prompt, wanted.shape[1] - prompt.shape[1]), wanted)


def test_fla_gradient_norms():
    metrics = json.loads((ORACLE / "fla_golden_cpu.json").read_text())["metrics"]
    ids = load_file(ORACLE / "fla_golden_cpu.safetensors")["ids"]
    model = convert.load(ORACLE / "fla_hf_cpu")
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(metrics["loss.chunk.f32"], rel=1e-6)
    norms = sorted(p.grad.norm().item() for p in model.parameters())
    assert norms == pytest.approx(sorted(metrics["grad_norms.chunk.f32"].values()), rel=1e-4)


def test_the_plain_forwards_of_the_other_tests_are_those_of_the_real_implementations(torchscale_file):
    args = json.loads((ORACLE / "torchscale_small.json").read_text())["config"]
    state = {name.removeprefix("state."): x for name, x in torchscale_file.items() if name.startswith("state.")}
    plain = peers.torchscale_logits(state, args, torchscale_file["ids"])
    assert difference(plain, torchscale_file["logits.recurrent.f64"]) < 1e-13
    config = json.loads((ORACLE / "fla_hf_cpu" / "config.json").read_text())
    theirs = load_file(ORACLE / "fla_golden_cpu.safetensors")
    plain = peers.fla_logits(load_file(ORACLE / "fla_hf_cpu" / "model.safetensors"), config, theirs["ids"])
    assert difference(plain, theirs["logits.naive.f64"]) < 1e-13
