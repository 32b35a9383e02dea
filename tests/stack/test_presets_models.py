"""The model of every preset: parameters at full size, and training and decoding of the small version."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from retnet.models.cost import idle_parameters, mixer_costs, model_cost, parameter_counts
from retnet.models.decode.generation import generate
from retnet.models.lm import LanguageModel
from retnet.stack.build import model_config
from retnet.stack.presets import load_preset, preset_names
from retnet.stack.summary import summarize

MINIS = [name for name in preset_names() if name.endswith("_mini")]
FULL = sorted(set(preset_names()) - set(MINIS))
TEXT = b"a model reads what was written before and guesses what comes next, one byte after another. " * 6


@pytest.mark.parametrize("name", FULL)
def test_the_parameters_of_a_full_preset_are_counted(name):
    stack = load_preset(name)
    config = model_config(stack)
    count = parameter_counts(config)["total"]
    assert 1e9 < count < 2.7e9
    assert 0.9 < count / stack.spec.model.target_params < 1.1
    cost = model_cost(config, stack.spec.model.max_seq_len)
    assert cost.forward_flops > 2 * (count - idle_parameters(config)) - 1e9 * (not config.tie_embeddings)
    rows = summarize(stack, config)
    final_norm = config.d_model * (2 if config.final_norm == "layer" else 1)
    in_layers = sum(row.mixer_parameters + row.feed_forward_parameters for row in rows)
    assert in_layers + final_norm == parameter_counts(config)["layers"]


def test_the_llama_preset_has_the_parameters_of_llama():
    assert parameter_counts(model_config(load_preset("arch_beginner_llama")))["total"] == 1_235_814_400


@pytest.mark.parametrize("name", MINIS)
def test_a_mini_preset_learns_in_ten_steps_and_decodes_with_a_cache(name):
    config = model_config(load_preset(name))
    assert 2e5 < parameter_counts(config)["total"] < 3e6
    model = LanguageModel(config)
    ids = torch.tensor(list(TEXT[:192])).view(2, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(10):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0, losses

    model.eval()
    with torch.no_grad():
        prompt = ids[:1, :40]
        new = torch.stack(list(generate(model, prompt, 8, temperature=0)), 1)
        full = model(torch.cat([prompt, new], 1)).logits[:, 39:-1]
    assert torch.equal(full.argmax(-1), new)
    assert F.cross_entropy(full.flatten(0, 1), new.flatten()) < 6


@pytest.mark.parametrize("name", MINIS)
def test_the_cost_of_weights_equals_the_matrix_products_counted_by_torch(name):
    """The counter does not see the mixing itself, and biases and norms are negligible."""
    config, tokens = model_config(load_preset(name)), 128
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LanguageModel(config).eval()(torch.zeros(1, tokens, dtype=torch.long))
    beside = sum(cost.forward_flops for cost in mixer_costs(config, tokens))
    weights = model_cost(config, tokens).forward_flops - beside
    assert counter.get_total_flops() / tokens == pytest.approx(weights, rel=0.02)
