"""Mixtures of experts with transformers: against its own, under its Trainer, saved and loaded."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    DeepseekV3Config,
    Trainer,
    TrainingArguments,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from retnet.layers.moe import MoE, MoEConfig
from retnet.layers.routing_bias import update_routing_biases
from retnet.models.directory import load_model
from retnet.models.hf import RetNetForCausalLM
from retnet.models.hf.routing import UpdateRoutingBiases
from tests.small_models import GROUPED, PAPER, hf_model, random_ids


def test_routing_is_that_of_deepseek_v3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "moe_intermediate_size": 10, "n_shared_experts": 2, "n_routed_experts": 8}
    choice = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
    theirs = DeepseekV3MoE(DeepseekV3Config(**sizes, **choice, routed_scaling_factor=2.5)).double()
    groups = {"num_groups": 4, "top_groups": 2, "bias_update_rate": 1e-3}
    config = MoEConfig(8, 3, 10, router="sigmoid", routed_scale=2.5, shared_hidden_dim=20, **groups)
    ours = MoE(config, 12).double()
    with torch.no_grad():
        for x in (*theirs.parameters(), theirs.gate.e_score_correction_bias):
            x.data = torch.randn(x.shape, dtype=torch.float64) * 0.3
        gate, up = theirs.experts.gate_up_proj.chunk(2, 1)
        ours.load_state_dict(
            {
                "router.weight": theirs.gate.weight,
                "routing_bias": theirs.gate.e_score_correction_bias,
                "gate_proj.weight": gate,
                "up_proj.weight": up,
                "down_proj.weight": theirs.experts.down_proj,
                **{f"shared.{name}": x for name, x in theirs.shared_experts.state_dict().items()},
            }
        )
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        expected = theirs.eval()(x)
        # Their router computes in float32.
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 8])
def test_the_callback_moves_biases_by_the_load_of_whole_steps_of_the_trainer(tmp_path, rows):
    model, ids = hf_model([replace(PAPER, feed_forward=GROUPED)] * 2), random_ids(8, 12)
    before, expected = model.model.layers[0].feed_forward.routing_bias.clone(), deepcopy(model.model).train()
    expected(ids)
    peak = update_routing_biases(expected)
    features = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, max_steps=1, report_to=[],
        learning_rate=0.0, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callback = UpdateRoutingBiases()
    collator = DataCollatorWithFlattening()
    Trainer(model, arguments, train_dataset=features, data_collator=collator, callbacks=[callback]).train()
    for ours, other in zip(model.model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, other)
    assert callback.peak == pytest.approx(peak.item())
    assert not torch.equal(before, model.model.layers[0].feed_forward.routing_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_are_saved_and_loaded_in_float32(tmp_path, dtype):
    model = hf_model("experts")
    bias = model.model.layers[1].feed_forward.routing_bias
    assert bias.abs().min() > 0
    model.save_pretrained(tmp_path)
    for loaded in (
        RetNetForCausalLM.from_pretrained(tmp_path, dtype=dtype).model,
        load_model(tmp_path, dtype=dtype),
        load_model(tmp_path).to(dtype),
    ):
        assert loaded.embedding.weight.dtype == dtype
        assert loaded.layers[1].feed_forward.routing_bias.dtype == torch.float32
        assert torch.equal(loaded.layers[1].feed_forward.routing_bias, bias)
