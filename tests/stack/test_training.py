"""Training hints as defaults of `retnet train`."""

import re

import pytest
from transformers import TrainingArguments

from retnet.models.lm import LanguageModel
from retnet.stack.build import model_config
from retnet.stack.presets import load_preset
from retnet.stack.schema import TrainingHints
from retnet.stack.training import router_lr_multiplier, training_defaults
from retnet.train.inputs import open_data
from retnet.train.muon_recipe import MuonArgs
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.recipe import DEFAULTS, load_recipe
from retnet.train.trainer import PackedTrainer, RunOptions
from tests.paths import ROOT

from .specs import changed, stack

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


def test_a_file_without_hints_sets_nothing():
    assert training_defaults(stack().spec) == {}
    assert training_defaults(stack(more="training_hints: {seed: 3, dropout: 0.1}\n").spec) == {}
    assert router_lr_multiplier(stack().spec) == 1.0


@pytest.mark.parametrize(("ratio", "steps"), [(0, 0), (0.5, 50), (1.0, 100)])
def test_the_warmup_ratio_is_a_share_of_the_run(ratio, steps, tmp_path):
    spec = stack(more=f"training_hints: {{warmup_steps_ratio: {ratio}}}\n").spec
    arguments = TrainingArguments(output_dir=str(tmp_path), **training_defaults(spec))
    assert arguments.get_warmup_steps(100) == steps


def test_hints_become_fields_of_training_arguments(tmp_path):
    spec = stack(more=ALL).spec
    arguments = TrainingArguments(output_dir=str(tmp_path), **training_defaults(spec))
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-3, 0.0, 2.0)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.8, 0.99)
    assert arguments.get_warmup_steps(1000) == 100
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
    assert router_lr_multiplier(spec) == 0.5


MUON = """\
training_hints:
  optimizer: hybrid
  optimizer_groups: {muon: ['**.weight'], adamw: ['embed_tokens.*', '*.router.weight']}
  muon: {ns_coefs: [3.4, -4.7, 2.0], stabilize_iters: 1}
"""


def test_settings_and_groups_of_muon_are_those_of_the_recipe(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(changed(more=MUON))
    recipe = load_recipe(None, [f"model={path}", "data=stdlib"])
    assert recipe.training_arguments().optim == "muon"
    expected = MuonArgs(ns_steps=8, ns_coefs=(3.4, -4.7, 2.0), stabilize_steps=1, stabilize_coefs=(2.0, -1.5, 0.5))
    assert MuonArgs.parse(recipe.training["optim_args"]) == expected
    assert recipe.optimizer_groups == {"muon": ["**.weight"], "adamw": ["embed_tokens.*", "*.router.weight"]}
    own = load_recipe(
        None, [f"model={path}", "data=x", "optimizer_groups={muon: [head.weight]}", "optim_args=ns_steps=3"]
    )
    assert own.optimizer_groups == {"muon": ["head.weight"]}
    assert MuonArgs.parse(own.training["optim_args"]) == MuonArgs(ns_steps=3)
    other = load_recipe(None, [f"model={path}", "data=x", "optim=adamw_torch"])
    assert (other.optimizer_groups, other.training.get("optim_args")) == (None, None)


def test_groups_without_muon_and_of_other_algorithms_are_refused():
    with pytest.raises(ValueError, match=r"optimizer_groups with optim .*; accepted with it: 'muon'"):
        load_recipe(None, ["model=retnet-tiny", "data=x", "optimizer_groups={muon: ['*']}"])
    with pytest.raises(ValueError, match="optimizer_groups"):
        load_recipe(None, ["model=retnet-tiny", "data=x", "optim=muon", "optimizer_groups={sgd: ['*']}"])


def test_the_optimizer_of_a_stack_is_that_of_its_recipe(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(changed(more="training_hints: {optimizer: muon}\n"))
    assert load_recipe(None, [f"model={path}", "data=stdlib"]).training_arguments().optim == "muon"
    given = load_recipe(None, [f"model={path}", "data=stdlib", "optim=adamw_torch"])
    assert given.training_arguments().optim == "adamw_torch"


def test_values_from_the_user_override_hints():
    spec = stack(more=ALL).spec
    assert "learning_rate" not in training_defaults(spec, {"learning_rate"})
    assert "lr_scheduler_kwargs" not in training_defaults(spec, {"lr_scheduler_type"})
    muon = stack(more="training_hints: {optimizer: muon}\n").spec
    assert training_defaults(muon, {"optim"}) == {}


def test_the_hints_of_a_stack_are_defaults_of_a_recipe(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(changed(more=ALL))
    recipe = load_recipe(None, [f"model={path}", "data=stdlib", "weight_decay=0.3"])
    assert (recipe.training["learning_rate"], recipe.training["weight_decay"]) == (1e-3, 0.3)
    assert recipe.training["lr_scheduler_type"] == "cosine_with_min_lr"
    assert recipe.router_lr_multiplier == 0.5
    assert load_recipe(None, [f"model={path}", "data=x", "router_lr_multiplier=0.1"]).router_lr_multiplier == 0.1
    assert load_recipe(None, ["model=retnet-tiny", "data=x"]).training["learning_rate"] == DEFAULTS["learning_rate"]


def test_routers_have_their_own_learning_rate_and_experts_weight_decay(text_folder, tmp_path):
    model = PackedForCausalLM.wrap(LanguageModel(model_config(load_preset("arch_expert_retnet_moe_mini"))))
    words = ["learning_rate=0.1", "weight_decay=0.5", f"output_dir={tmp_path}", f"data={text_folder}"]
    recipe = load_recipe(None, ["model=arch_expert_retnet_moe_mini", *words])
    arguments = recipe.training_arguments()
    data = open_data(recipe, arguments)
    trainer = PackedTrainer(model, arguments, data.train, data.valid, RunOptions(router_lr_multiplier=0.2))
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(0.02 if name.endswith("router.weight") else 0.1)
        if "feed_forward." in name and name.endswith("proj.weight"):
            assert decay == 0.5, name


def test_the_guide_lists_the_defaults_of_a_run_without_hints():
    """Per key: its setting, and what `retnet train` does without it."""
    part = (ROOT / "docs/reference/stack.md").read_text().split("## training_hints")[1].split("## compat")[0]
    rows = {key: cells for key, *cells in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", part, re.M)}
    model_keys = {"init", "dropout", "checkpointing", "seed", "router_aux_loss_coef", "mup"}
    assert rows.keys() == TrainingHints.model_fields.keys() - model_keys
    recipe = load_recipe(None, ["model=retnet-tiny", "data=x"])
    fields = recipe.training_arguments().to_dict() | recipe.model_dump(exclude={"training"})
    for key in ("lr_peak", "betas", "weight_decay", "grad_clip", "warmup_steps_ratio", "router_lr_multiplier"):
        settings, without = rows[key]
        values = [float(fields[name]) for name in re.findall(r"`(\w+)`", settings)]
        assert values == [float(x) for x in without.split(", ")], key
    assert rows["lr_floor_ratio"][1].startswith(fields["lr_scheduler_type"])
    assert fields["optim"].startswith(rows["optimizer"][1])
