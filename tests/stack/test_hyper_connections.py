"""`residual.type: hyper_connection`: its rules, what it is built as, and how it is described."""

import pytest

from retnet.layers.hyper_connection import HyperConnectionConfig
from retnet.stack import Category
from retnet.stack.build import model_config
from retnet.stack.picture import draw_stack
from retnet.stack.report import realism_report
from retnet.stack.summary import summarize
from tests.cli.command import run

from .specs import FLOAT32, assert_decodes_as_it_reads, changed, faults, only, stack

MLP = "ffn: {type: mlp}"
HERE = "layer_templates.a.residual"


def hyper(values: str = "expand: 2", more: str = "") -> tuple[str, str]:
    return MLP, f"{MLP}\n    residual: {{type: hyper_connection, hyper: {{{values}}}{more}}}"


@pytest.mark.parametrize(
    ("values", "config"),
    [
        ("expand: 4, mixing: birkhoff, sinkhorn_iters: 3", HyperConnectionConfig(4)),
        ("expand: 2", HyperConnectionConfig(2)),
        ("expand: 2, mixing: unconstrained, sinkhorn_iters: 0", HyperConnectionConfig(2, "unconstrained", 0)),
        ("expand: 4, mixing: learned_lowrank", HyperConnectionConfig(4, "learned_lowrank")),
        ("expand: 1, vendor.retnet.dynamic: false", HyperConnectionConfig(1, dynamic=False)),
    ],
)
def test_the_keys_are_fields_of_the_layer(values, config):
    layers = model_config(stack(hyper(values, ", scaling: 0.5"))).layers
    assert [layer.hyper for layer in layers] == [None, None, config]
    assert (layers[2].residual, layers[2].residual_scale, layers[2].norm_position) == ("sequential", 0.5, "pre")


def test_an_override_of_the_scale_keeps_the_streams():
    override = "template: a", "template: a\n  override: {residual: {scaling: 0.5}}"
    layer = model_config(stack(hyper(), override)).layers[2]
    assert (layer.hyper, layer.residual_scale) == (HyperConnectionConfig(2), 0.5)


@pytest.mark.parametrize(
    ("residual", "path", "what"),
    [
        ("type: hyper_connection", ".hyper", "type: hyper_connection needs the key 'hyper'"),
        ("type: hyper_connection, hyper: null", ".hyper", "type: hyper_connection needs the key 'hyper'"),
        ("type: hyper_connection, hyper: {}", ".hyper", "the key 'expand' is missing"),
        ("type: hyper_connection, hyper: 4", ".hyper", "expected a mapping, got 4"),
        ("type: hyper_connection, hyper: {expand: 0}", ".hyper.expand", "expected a positive integer, got 0"),
        ("type: hyper_connection, hyper: {expand: 65}", ".hyper.expand", "expected an integer of at most 64, got 65"),
        ("type: hyper_connection, hyper: {expand: 2, mixing: rotate}", ".hyper.mixing", "unknown value 'rotate'"),
        ("type: hyper_connection, hyper: {expand: 2, sinkhorn_iters: -1}", ".hyper.sinkhorn_iters",
         "expected an integer of at least 0, got -1"),
        ("type: hyper_connection, hyper: {expand: 2, streams: 4}", ".hyper", "unknown key 'streams'"),
        ("type: ladder", ".type", "unknown value 'ladder'"),
        ("hyper: {expand: 2}", ".hyper", "`hyper` cannot be given with type: sequential"),
        ("type: parallel, hyper: null", ".hyper", "`hyper` cannot be given with type: parallel"),
    ],
)  # fmt: skip
def test_a_fault_is_named_at_its_place(residual, path, what):
    fault = only(changed((MLP, f"{MLP}\n    residual: {{{residual}}}")))
    assert (fault.dotted, fault.what, fault.category) == (f"{HERE}{path}", what, Category.VALIDATION)


def test_norms_after_the_residual_are_refused_in_templates_and_overrides():
    what = "position: post is not defined with residual.type: hyper_connection"
    post = hyper()[1] + "\n    norm: {position: post}"
    assert (only(changed((MLP, post))).dotted, only(changed((MLP, post))).what) == (
        "layer_templates.a.norm.position", what
    )  # fmt: skip
    override = "template: a", "template: a\n  override: {norm: {position: post}}"
    assert [fault.what for fault in faults(changed(hyper(), override))] == [what]


def test_a_stack_with_streams_decodes_as_it_reads_and_predicts_further_tokens():
    mtp = "type: causal_lm", "type: causal_lm_mtp\n  mtp: {head_template: a, head_layers: 2}"
    model = assert_decodes_as_it_reads(model_config(stack(hyper(), mtp, FLOAT32)))
    assert model.mtp[0].blocks[0].gives_streams


def test_parallel_streams_may_have_residual_streams_inside():
    body = (
        "- template: a",
        "- parallel: [{stream: x, body: [{template: a, repeat: 2}]}, {stream: y, body: [{template: r}]}]",
    )
    config = model_config(stack(hyper(), body))
    assert [block.hyper is None for block in config.layers[2].mixer.blocks] == [False, False, True]


@pytest.mark.slow
def test_info_says_how_many_streams_there_are(tmp_path, capsys):
    path = tmp_path / "streams.yml"
    path.write_text(changed(hyper()))
    assert run("info", path) == 0
    assert "2 residual streams" in capsys.readouterr().out


def test_tables_pictures_and_reports_say_what_the_streams_are(tmp_path, capsys):
    found = stack(hyper("expand: 4, mixing: unconstrained, sinkhorn_iters: 5"), FLOAT32)
    config = model_config(found)
    plain = summarize(stack(FLOAT32), model_config(stack(FLOAT32)))[2]
    row, of_one = summarize(found, config)[2], 24 * (1 + 4 * 64) + 3
    assert row.mixer_parameters - plain.mixer_parameters == of_one
    assert row.feed_forward_parameters - plain.feed_forward_parameters == of_one
    figure = draw_stack(found, config)
    assert "residual streams, up to 4 per layer" in {text.get_text() for text in figure.legends[0].get_texts()}
    [lines] = [each for each in figure.axes[0].collections if each.get_gid() == "residual streams"]
    assert [round(float(y)) for path in lines.get_paths() for y in path.vertices[:, 1]] == [2] * 8
    rules = {finding.rule: finding.message for finding in realism_report(found)}
    assert rules["hyper_connections"] == "template 'a': sinkhorn_iters has no effect with mixing: unconstrained"
    path = tmp_path / "streams.yml"
    path.write_text(changed(hyper()))
    assert run("stack", "explain", path) == 0
    printed = capsys.readouterr().out
    assert "pre-rmsnorm, 2" in printed
    assert "hyper-connections: 2 residual streams (birkhoff, 3 iterations); 6.8K FLOPs per token forward (" in printed
