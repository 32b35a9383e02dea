"""The programs of examples/ run, and do what they say."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import retnet
from retnet.layers import mixers
from retnet.layers.token_layout import TokenLayout
from retnet.models.states import ModelState
from tests.paths import ROOT
from tests.small_models import random_ids, unit_gain_


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


def test_a_classifier_reads_each_packed_text_as_if_it_were_alone(byte_model):
    example = load("classify")
    lines = example.labelled_lines("abc.py")
    assert {kind for _, kind in lines} == {0, 1}
    assert dict(lines)["def abstractmethod(funcobj):"] == 1
    assert dict(lines)['"""A decorator indicating abstract methods.'] == 0
    model = example.Classifier(retnet.load(byte_model, "cpu"))
    texts = [text for text, _ in lines[:5]]
    with torch.no_grad():
        torch.testing.assert_close(model(texts), torch.cat([model([text]) for text in texts]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_classifier_learns(tmp_path):
    assert load("classify").main("retnet-tiny-conv") > 0.8
