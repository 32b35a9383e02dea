"""Stacks of every kind of mixture of experts, settings of Muon, execution modes: checked, built, trained."""

import io

import pytest
import torch
from rich.console import Console

from retnet import load
from retnet.layers.moe import MoE
from retnet.models.decode.generation import generate
from retnet.models.lm import LanguageModel
from retnet.stack import Category, parse_stack
from retnet.stack.build import model_config
from retnet.stack.report import realism_report
from retnet.stack.summary import summarize
from retnet.train.run import train
from retnet.train.throughput import Peak
from tests.train.conftest import recipe_for

from .specs import changed, only, stack

FFN = "ffn: {type: mlp}"
NARROW = ("max_seq_len: 256", "max_seq_len: 256\n  mlp_ratio: 1\n  dtype: float32")


def moe(options: str, experts: int = 8, top_k: int = 2) -> tuple[str, str]:
    return FFN, f"ffn: {{type: moe, activation: swiglu, moe: {{experts: {experts}, top_k: {top_k}, {options}}}}}"


# Kind -> the section's options, the words of `explain`.
KINDS = {
    "sigmoid": ("affinity: sigmoid", "2 of 8 experts (sigmoid)"),
    "DeepSeek-V4": (
        "affinity: sqrt_softplus, shared_experts: 1, routing: {type: learned}, bias_correction: {enabled: true}",
        "2 of 8 experts (sqrt softplus, biased) + 1 shared",
    ),
    "DeepSeek-V3": (
        "router: sigmoid, affinity: sigmoid, load_balance_coef: 0, shared_experts: 2, vendor.retnet.routed_scale: 2.5, "
        "bias_correction: {enabled: true, update_rate: 0.01, target_imbalance: 0.1}, "
        "balance: {sequence_aux_coef: 1.0e-3, group_limit: 2}, vendor.retnet.groups: 4",
        "2 of 8 experts (sigmoid, biased, 2 of 4 groups, x 2.5) + 2 shared",
    ),
    "limited groups": ("balance: {group_limit: 3}", "2 of 8 experts (3 of 8 groups)"),
    "balanced sequences": ("balance: {sequence_aux_coef: 0.01, group_limit: null}", "2 of 8 experts"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_the_kind_learns_decodes_as_it_reads_and_generates(kind):
    options, words = KINDS[kind]
    text = parse_stack(changed(NARROW, moe(options)))
    config = model_config(text)
    assert summarize(text, config)[-1].feed_forward == f"{words}, SwiGLU 64"
    model = LanguageModel(config).train()
    ids = torch.arange(40)[None] % 7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval()
    with torch.no_grad():
        whole, first = model(ids).logits, model(ids[:, :13], carry=True)
        second = model(ids[:, 13:39], first.state, carry=True)
        parts = [first, second, model(ids[:, 39:], second.state)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), whole, rtol=1e-4, atol=1e-4)
    assert len(list(generate(model, ids[:, :5], 4))) == 4


TRAINED = """\
training_hints:
  optimizer: hybrid
  optimizer_groups: {muon: ['**.weight'], adamw: ['embed_tokens.*', 'no_such.*']}
  muon: {ns_iters: 4, stabilize_iters: 1}
execution_modes:
- {name: think, max_tokens: 200, visible_to_user: false}
- {name: answer, max_tokens: 100, loss_weight: 0.5}
"""


def test_a_whole_stack_trains_under_muon_by_groups_is_saved_and_generates(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("retnet.train.trainer.device_peak", lambda device, dtype: Peak(1e12, "a fixed rate"))
    monkeypatch.setattr("retnet.train.finish._draw_curve", lambda *arguments: None)
    file, output, console = tmp_path / "mine.yml", tmp_path / "out", Console(file=io.StringIO(), width=200)
    file.write_text(changed(NARROW, moe(KINDS["DeepSeek-V3"][0]), more=TRAINED))
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    train(recipe_for(file, text_folder, output, **settings), console)
    shown = console.file.getvalue()
    assert "optimizer_groups: 'no_such.*' matches no parameter" in shown
    assert "embed_tokens" not in shown
    model = load(str(output))
    (experts,) = (module for module in model.modules() if isinstance(module, MoE))
    assert experts.routing_bias.abs().max() > 0
    assert len(list(generate(model, torch.tensor([[1, 2, 3]]), 4))) == 4


def test_execution_modes_are_accepted_with_a_warning():
    found = {finding.message for finding in realism_report(stack(more=TRAINED)) if finding.rule == "execution_modes"}
    assert found == {
        "execution_modes (think, answer) have no effect on the model, its training or generation",
        "the max_tokens of execution_modes add up to 300, more than max_seq_len 256",
    }
    assert model_config(stack(more=TRAINED)) == model_config(stack(more=TRAINED.split("execution_modes")[0]))
    assert stack(more="execution_modes: null\n").spec.execution_modes is None


def rules(*pairs: tuple[str, str], more: str = "") -> set[str]:
    return {finding.rule for finding in realism_report(stack(*pairs, more=more))}


def test_the_report_warns_of_settings_that_contradict_each_other_or_do_nothing():
    assert "affinity_consistency" in rules(moe("affinity: sqrt_softplus"))
    assert "affinity_consistency" in rules(moe("router: softmax, affinity: sigmoid"))
    assert "affinity_consistency" not in rules(moe("affinity: sqrt_softplus, bias_correction: {enabled: true}"))
    assert "bias_correction_disabled" in rules(moe("bias_correction: {update_rate: 0.1}"))
    assert "muon_without_optimizer" in rules(more="training_hints: {muon: {ns_iters: 3}}\n")
    assert "muon_without_optimizer" not in rules(more=TRAINED)


HINTS = "training_hints: {optimizer: muon, "
OUR_GROUPS = "moe.vendor.retnet.groups"
FAULTS = {
    "shared_experts below 0": (moe("shared_experts: -1"), "", "moe.shared_experts"),
    "shared_experts a flag": (moe("shared_experts: true"), "", "moe.shared_experts"),
    "affinity": (moe("affinity: relu"), "", "moe.affinity"),
    "update_rate": (moe("bias_correction: {enabled: true, update_rate: -1}"), "", "moe.bias_correction.update_rate"),
    "an unknown key": (moe("bias_correction: {rate: 1}"), "", "moe.bias_correction"),
    "group_limit": (moe("balance: {group_limit: 0}"), "", "moe.balance.group_limit"),
    "groups without a limit": (moe("vendor.retnet.groups: 2"), "", OUR_GROUPS),
    "groups that do not divide": (moe("vendor.retnet.groups: 3, balance: {group_limit: 1}"), "", OUR_GROUPS),
    "too small groups": (moe("vendor.retnet.groups: 8, balance: {group_limit: 1}"), "", OUR_GROUPS),
    "a salt of learned routing": (moe("routing: {type: learned, hash_salt: 3}"), "", "moe.routing"),
    "two coefficients": ((), HINTS + "muon: {ns_coefs: [1.0, 2.0]}}\n", "training_hints.muon.ns_coefs"),
    "no steps": ((), HINTS + "muon: {ns_iters: 0}}\n", "training_hints.muon.ns_iters"),
    "a pattern that is no text": ((), HINTS + "optimizer_groups: {muon: [3]}}\n", "training_hints.optimizer_groups"),
    "another algorithm": ((), HINTS + "optimizer_groups: {sgd: [x]}}\n", "training_hints.optimizer_groups"),
    "no modes": ((), "execution_modes: []\n", "execution_modes"),
    "two modes of one name": (
        (),
        "execution_modes: [{name: a, max_tokens: 1}, {name: a, max_tokens: 2}]\n",
        "execution_modes[1].name",
    ),
    "a mode with an unknown key": ((), "execution_modes: [{name: a, max_tokens: 1, x: 2}]\n", "execution_modes[0]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_place(fault):
    pair, more, path = FAULTS[fault]
    found = only(changed(*([pair] if pair else []), more=more))
    assert found.category is Category.VALIDATION
    assert path in found.dotted


def test_routing_by_a_hash_is_refused_by_name():
    found = only(changed(moe("routing: {type: hash, hash_salt: 7}")))
    assert (found.category, found.dotted) == (Category.UNSUPPORTED, "layer_templates.a.ffn.moe.routing")
    assert "`type: hash`" in found.what
