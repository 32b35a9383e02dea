"""Training hints as arguments of the Trainer."""

import pytest
from transformers import TrainingArguments

from retnet.stack.training import router_lr_multiplier, training_defaults

from .specs import stack

ALL = """\
training_hints:
  lr_peak: 1.0e-3
  lr_floor_ratio: 0.2
  betas: [0.8, 0.99]
  weight_decay: 0.0
  grad_clip: 2
  warmup_steps_ratio: 0.1
  router_lr_multiplier: 0.5
"""


def test_a_file_without_hints_asks_for_nothing():
    assert training_defaults(stack().spec) == {}
    assert training_defaults(stack(more="training_hints: {seed: 3, dropout: 0.1}\n").spec) == {}
    assert router_lr_multiplier(stack().spec) == 1.0


def test_hints_become_fields_of_training_arguments(tmp_path):
    spec = stack(more=ALL).spec
    arguments = TrainingArguments(output_dir=str(tmp_path), **training_defaults(spec))
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-3, 0.0, 2.0)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.8, 0.99)
    assert arguments.get_warmup_steps(1000) == 100
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert router_lr_multiplier(spec) == 0.5


def test_an_optimizer_that_training_lacks_is_refused():
    with pytest.raises(ValueError, match="optimizer is muon; accepted"):
        training_defaults(stack(more="training_hints: {optimizer: muon}\n").spec)
