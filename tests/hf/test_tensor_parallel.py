"""transformers' tensor parallelism with our styles: plans, and models loaded, run and saved by two processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.tensor_parallel import ByHeads
from tests.hf import tensor_parallel_processes
from tests.small_models import EXPERTS, GLU, HYENA, PAPER, hf_model, small_model
from tests.torchrun import on_processes


def test_the_plan_names_layers_and_vocabulary_and_its_styles_are_registered():
    model = hf_model("hybrid")
    assert model.tp_plan == {
        "model.embedding": "retnet_vocabulary",
        "model.layers.*.mixer": "retnet_heads",
        "model.layers.*.feed_forward": "retnet_heads",
        "model.head": "retnet_vocabulary",
    }
    assert model.supports_tp_plan
    assert RetNetConfig.base_model_tp_plan == model.tp_plan
    assert all(style in ALL_PARALLEL_STYLES for style in model.tp_plan.values())


def test_a_tied_head_is_not_named_again():
    assert "model.head" not in hf_model(tie_embeddings=True).tp_plan


ODD = replace(GLU, hidden_dim=33)


class TwoProcesses:
    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (small_model([HYENA]).layers[0].mixer, "Hyena: its filters"),
        (small_model([replace(PAPER, feed_forward=EXPERTS)]).layers[0].feed_forward, "a MoE, which is not divided"),
        (small_model([replace(PAPER, feed_forward=ODD)]).layers[0].feed_forward, "hidden_dim is 33 .* accepted"),
    ],
)
def test_layers_that_do_not_divide_are_refused_by_name(module, message):
    with pytest.raises(ValueError, match=message):
        ByHeads().install_forward(module, TwoProcesses())


@pytest.mark.slow
def test_two_processes_load_run_and_save_what_one_does(tmp_path):
    assert on_processes(2, tensor_parallel_processes.__file__, tmp_path) == "equal"
