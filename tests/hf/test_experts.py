"""Mixtures of experts against those of transformers."""

import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from retnet.layers.moe import MoE, MoEConfig


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
