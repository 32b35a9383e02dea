"""A mixer from outside the package: with one entry in `MIXERS`, all of `retnet.stack` works with it."""

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.models.lm import LanguageModel
from retnet.stack import Category, Fault
from retnet.stack.build import model_config
from retnet.stack.estimate import estimate_parameters
from retnet.stack.mixers import MIXERS, MixerSettings
from retnet.stack.picture import draw_stack, save_picture
from retnet.stack.report import realism_report
from retnet.stack.scalars import PositiveInt
from retnet.stack.schema import Spec
from retnet.stack.summary import summarize

from .specs import FLOAT32, changed, faults, only, stack

MIXER_A = "type: attention\n      attention: {window: 16}"


class Toy(MixerSettings):
    """Attention in a window, `span`."""

    STATE_KEY = "kv_cache"

    span: PositiveInt = 4

    def config(self, spec: Spec) -> AttentionConfig:
        heads = spec.model.n_heads
        return AttentionConfig(heads, num_kv_heads=heads, head_dim=spec.model.head_dim, window=self.span)

    def faults(self, model, embedding):
        if model is not None and self.span > model.max_seq_len:
            yield Fault(("span",), f"span {self.span} is longer than max_seq_len", f"write at most {model.max_seq_len}")


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(MIXERS, "toy", Toy)


def toy(settings: str) -> tuple[str, str]:
    return MIXER_A, f"type: toy\n      toy: {{{settings}}}"


def test_a_registered_mixer_is_built_and_runs():
    config = model_config(stack(toy("span: 8"), FLOAT32))
    assert config.layers[2].mixer == AttentionConfig(4, num_kv_heads=4, head_dim=16, window=8)
    assert LanguageModel(config)(torch.arange(9)[None]).logits.shape == (1, 9, 257)


def test_absent_settings_of_a_registered_mixer_are_its_defaults():
    assert model_config(stack((MIXER_A, "type: toy"))).layers[2].mixer.window == 4


def test_an_unknown_key_of_a_registered_mixer_is_refused_with_its_place_and_the_nearest_key():
    fault = only_with_toy("spam: 3")
    assert (fault.dotted, fault.mark.line, fault.mark.column) == ("layer_templates.a.mixer.toy", 23, 13)
    assert fault.what == "unknown key 'spam'"
    assert fault.fix == "did you mean span? keys known here: span"
    assert fault.see == "docs/reference/stack.md#mixer"


@pytest.mark.parametrize("span", ["0", "'8'", "1.5", "1000"])
def test_a_value_or_clash_of_a_registered_mixer_is_reported_at_its_key(span):
    fault = only_with_toy(f"span: {span}")
    assert (fault.dotted, fault.mark.line, fault.mark.column) == ("layer_templates.a.mixer.toy.span", 23, 19)


def test_a_registered_mixer_may_not_set_the_state_key_of_another():
    ffn = "ffn: {type: mlp}"
    [fault] = problems_with_toy("span: 8", (ffn, f"{ffn}\n    state: {{ssm_state: true}}"))
    assert (fault.category, fault.what) == (Category.COMPATIBILITY, "a toy mixer has no ssm_state")


def test_a_misspelt_type_is_answered_with_the_registered_mixer():
    fault = only(changed((MIXER_A, "type: toi")))
    assert fault.fix == "did you mean toy? write one of: attention, mamba, retnet, hyena, branched, toy"


def test_a_registered_mixer_is_in_the_report_the_table_and_the_picture(tmp_path):
    with_toy = stack(toy("span: 8"))
    assert realism_report(with_toy)[-1].message == "3 layers: 2 retnet, 1 toy"
    assert estimate_parameters(with_toy.spec, with_toy.layers) > 0
    config = model_config(with_toy)
    row = summarize(with_toy, config)[2]
    assert (row.mixer, row.reach, row.mixer_parameters) == ("toy", None, 4 * 64 * 64 + 64)  # and the norm
    save_picture(draw_stack(with_toy, config), tmp_path / "toy.svg")
    assert Toy.COLOUR in (tmp_path / "toy.svg").read_text()


def test_without_an_entry_the_type_is_unknown(monkeypatch):
    monkeypatch.delitem(MIXERS, "toy")
    [fault, *_] = problems_with_toy("span: 8")
    assert "toy" in fault.what


def only_with_toy(settings: str):
    [fault] = problems_with_toy(settings)
    return fault


def problems_with_toy(settings: str, *others: tuple[str, str]):
    return faults(changed(toy(settings), *others))
