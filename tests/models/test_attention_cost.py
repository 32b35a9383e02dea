"""What attention costs: pairs counted one by one, and the cache that a model really keeps."""

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.models.config import ModelConfig
from retnet.models.cost import attention_cost, model_cost
from retnet.models.lm import LanguageModel


@pytest.mark.parametrize(("window", "context"), [(None, 7), (3, 7), (7, 7), (9, 7), (1, 5)])
def test_operations_are_four_a_pair_and_element(window, context):
    config = AttentionConfig(4, 2, 8, window=window)
    cost = attention_cost(config, context, 4)
    seen = [min(t + 1, window or context) for t in range(context)]
    assert cost.forward_flops == pytest.approx(4 * 4 * 8 * sum(seen) / context)
    assert cost.decode_flops == 4 * 4 * 8 * seen[-1]


def test_state_is_the_window_that_a_model_keeps():
    layer = BlockConfig(AttentionConfig(4, 2, 8, window=6), FeedForwardConfig(32))
    model = LanguageModel(ModelConfig(9, 32, (layer, layer)))
    state = model(torch.zeros(1, 20, dtype=torch.long), carry=True).state
    assert state.nbytes == model_cost(model.config, 20).state_bytes == model_cost(model.config, 10**6).state_bytes
