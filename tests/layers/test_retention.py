"""Multi-scale retention: the decay that its tokens choose."""

import torch
import torch.nn.functional as F

from retnet.layers.retention import MultiScaleRetention, RetentionConfig


def test_a_gated_decay_is_the_sixteenth_root_of_a_sigmoid():
    layer = MultiScaleRetention(RetentionConfig(2, 8, 12, decay="gated"), 8)
    torch.nn.init.normal_(layer.decay_proj.weight)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer.log_decay(x), F.logsigmoid(layer.decay_proj(x)) / 16)
