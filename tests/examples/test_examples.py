"""The programs of examples/ run, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import retnet
from retnet.layers import mixers
from retnet.layers.token_layout import TokenLayout
from retnet.models.states import ModelState
from tests.paths import ROOT
from tests.small_models import random_ids, unit_gain_
from tests.torchrun import torchrun


def load(name: str, run_name: str = "example") -> SimpleNamespace:
    """The names that a program defines; with run_name "__main__" it also runs."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=run_name))


def test_a_forecaster_learns_and_streams(capsys):
    load("operator_in_your_model").main(steps=25)  # compares the two ways to run it by itself
    first, last = map(float, re.findall(r"([\d.]+) (?:before|after)", capsys.readouterr().out))
    assert last < 0.6 * first


@pytest.fixture
def custom(capsys) -> Iterator[SimpleNamespace]:
    try:
        yield load("custom_mixer", "__main__")
    finally:
        mixers.MIXERS.pop("mean", None)


def test_a_custom_mixer_computes_its_mean_whatever_the_split_padding_or_packing(custom, capsys):
    assert capsys.readouterr().out.strip()
    model, close = unit_gain_(custom.model), {"rtol": 1e-4, "atol": 1e-5}
    layer, x = model.layers[0].mixer, torch.randn(2, 6, 64)
    mean, a = torch.zeros(2, 64), 2 ** (-1 / 8)
    layout = TokenLayout.of((2, 6), x.device, carry=True)
    y, state = layer(x, None, layout)
    for t in range(6):
        mean = a * mean + (1 - a) * x[:, t]
        expected = layer.out(torch.sigmoid(layer.gate(x[:, t])) * mean)
        torch.testing.assert_close(y[:, t], expected, **close)
    ids = random_ids(2, 9, high=256)
    whole = model(ids).logits
    state, pieces = model.init_state(2), []
    with torch.no_grad():
        for piece in ids.split((4, 1, 1, 3), 1):
            output = model(piece, state, carry=True, in_place=True)
            state = output.state
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **close)
    packed = model(ids.reshape(1, 18), cu_seqlens=torch.tensor([0, 9, 18])).logits
    torch.testing.assert_close(packed.reshape(2, 9, -1), whole, **close)
    padded = torch.cat([random_ids(2, 3, seed=1), ids], 1)
    mask = torch.arange(12).expand(2, 12) >= 3
    torch.testing.assert_close(model(padded, mask=mask).logits[:, 3:], whole, **close)


def test_a_stream_goes_on_from_its_saved_state(byte_model, tmp_path, capsys):
    example, kept = load("stream_states"), tmp_path / "state.safetensors"
    data = bytes(range(32, 127)) * 3
    for name, part in (("first", data[:150]), ("rest", data[150:]), ("whole", data)):
        (tmp_path / name).write_bytes(part)
    for name in ("first", "rest"):
        example.main(str(byte_model), tmp_path / name, str(kept))
    assert f"{len(data) + 1:,} tokens read" in capsys.readouterr().out
    example.main(str(byte_model), tmp_path / "whole", str(tmp_path / "other.safetensors"))
    resumed, whole = ModelState.load(kept), ModelState.load(tmp_path / "other.safetensors")
    for one, other in zip(resumed, whole, strict=True):
        for name, x in one.tensors().items():
            torch.testing.assert_close(x, other.tensors()[name], rtol=1e-4, atol=1e-5)
    model = retnet.load(byte_model, "cpu")
    texts = example.continuations(model, resumed, 3, 12)
    assert len(set(texts)) == 3
    assert int(resumed.position) == len(data) + 1


def test_sessions_read_a_turn_alone(capsys):
    pytest.importorskip("fastapi")
    from tests.serve.http.server import live_server

    with live_server(max_tokens=None) as server:
        example = load("sessions_http")
        example.main(server.url)
        assert example.call("GET", f"{server.url}/v1/sessions")["data"] == []
    out = capsys.readouterr().out
    first = int(re.search(r"(\d+) tokens kept", out)[1])
    reused, second = map(int, re.search(r"(\d+) of (\d+) tokens were not read again", out).groups())
    assert first - 1 <= reused <= first  # the last token that was sampled is not in the state yet
    assert second == first + len("\n\ndef volume(radius):\n") + 40
    assert len(re.findall(r"continues sess_", out)) == 2


def saved(network, directory: Path) -> str:
    from retnet.models.hf import RetNetForCausalLM
    from retnet.models.hf.tokenizer import byte_tokenizer

    RetNetForCausalLM.wrap(network).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def test_lines_of_code_and_documentation_are_told_apart():
    lines = dict(load("classify").labelled_lines("abc.py"))
    assert lines["def abstractmethod(funcobj):"] == 1
    assert lines['"""A decorator indicating abstract methods.'] == 0


def test_a_classifier_is_trained_and_saved_as_transformers_saves_it(byte_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    source, output = saved(retnet.load(byte_model, "cpu"), tmp_path / "model"), tmp_path / "classifier"
    right = load("classify").main(source, output, "abc.py", steps=2, batch=4)
    assert 0 <= right <= 1
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.label2id == {"documentation": 0, "code": 1}
    before = retnet.load(byte_model, "cpu").embedding.weight
    assert not torch.equal(model.model.embedding.weight, before)  # the body is trained too


@pytest.mark.slow
def test_a_classifier_learns(tmp_path):
    source = saved(retnet.load("retnet-tiny-conv", "cpu"), tmp_path / "model")
    assert load("classify").main(source, tmp_path / "classifier") > 0.8


@pytest.mark.slow
def test_rows_shared_by_two_processes_train_as_in_one():
    printed = by_one_and_two_processes("long_rows", "--tokens", "1024", "--steps", "3")
    losses = [[float(x) for x in re.findall(r"^([\d.]+) nats", text, re.MULTILINE)] for text in printed]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)  # of sums in float32, in another order
    assert len(losses[0]) == 3


@pytest.mark.slow
def test_a_model_on_two_processes_generates_as_on_one():
    printed = by_one_and_two_processes("split_model", str(ROOT / "examples" / "hybrid.yml"), "--tokens", "12")
    found = [re.findall(r"^([\d,]+) weights per process: (.*)$", text, re.MULTILINE) for text in printed]
    weights = [int(lines[0][0].replace(",", "")) for lines in found]
    assert 0.5 * weights[0] < weights[1] < 0.51 * weights[0]
    assert [tokens for _, tokens in found[0]] == [tokens for _, tokens in found[1]]
    assert len(found[0]) == 2


def by_one_and_two_processes(name: str, *words: str) -> list[str]:
    """What a program prints alone, and under torchrun."""
    program, environment = [str(ROOT / "examples" / f"{name}.py"), *words], os.environ | {"OMP_NUM_THREADS": "1"}
    alone = subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment)
    done = [alone, torchrun(2, *program)]
    for each in done:
        assert each.returncode == 0, each.stderr
    return [each.stdout for each in done]
