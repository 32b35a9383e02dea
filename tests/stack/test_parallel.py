"""Schedule entries `parallel`: their rules, what they are built as, and how they are described."""

import pytest
import torch

from retnet.layers.streams import StreamsConfig
from retnet.models.cost import parameter_counts
from retnet.models.lm import LanguageModel
from retnet.stack import Category
from retnet.stack.build import model_config
from retnet.stack.estimate import estimate_parameters
from retnet.stack.report import realism_report
from retnet.stack.summary import summarize

from .specs import FLOAT32, assert_decodes_as_it_reads, changed, faults, legend_of, only, stack

X, Y = "{stream: x, body: [{template: r, repeat: 2}]}", "{stream: y, body: [{template: a}, {template: r}]}"


def parallel(streams: str = f"{X}, {Y}", more: str = "") -> tuple[str, str]:
    return "- template: a", f"- parallel: [{streams}]{more}"


def test_an_entry_is_one_layer_whose_streams_have_the_templates_layers():
    config = model_config(stack(parallel()))
    assert len(config.layers) == 3
    mixer = config.layers[2].mixer
    assert isinstance(mixer, StreamsConfig)
    assert mixer.streams[0] == (config.layers[0],) * 2
    assert [block.mixer.kind for block in mixer.streams[1]] == ["attention", "retention"]
    assert (mixer.merge, config.final_norm) == ("concat", "rms")


@pytest.mark.parametrize("merge", ["concat", "add", "gated", "cross_attn, from: y, to: x"])
def test_a_stack_with_streams_decodes_as_it_reads(merge):
    assert_decodes_as_it_reads(model_config(stack(parallel(more=f"\n  merge: {{type: {merge}}}"), FLOAT32)))


@pytest.mark.parametrize(
    ("streams", "more", "path", "what"),
    [
        (X, "", ".parallel", "expected at least two streams, got 1"),
        (f"{X}, {X}", "", ".parallel[1].stream", "there are two streams 'x'"),
        (f"{X}, {{stream: y, body: []}}", "", ".parallel[1].body", "expected at least one layer, got none"),
        (f"{X}, {{stream: y, body: [{{template: b}}]}}", "", ".parallel[1].body[0]", "there is no template 'b'"),
        (f"{X}, {{stream: y, body: [{{template: a, repeat: 0}}]}}", "", ".parallel[1].body[0].repeat",
         "expected a positive integer, got 0"),
        (f"{X}, {{stream: y, body: [{{template: a, override: {{}}}}]}}", "", ".parallel[1].body[0]",
         "unknown key 'override'"),
        (f"{X}, {{stream: y, body: [{{parallel: []}}]}}", "", ".parallel[1].body[0]",
         "a stream cannot contain `parallel`"),
        (f"{X}, {{stream: y}}", "", ".parallel[1]", "the key 'body' is missing"),
        (f"{X}, 7", "", ".parallel[1]", "expected a mapping, got 7"),
        (f"{X}, {Y}", "\n  merge: {type: mean}", ".merge.type", "unknown value 'mean'"),
        (f"{X}, {Y}", "\n  merge: {projection: false}", ".merge.projection",
         "without a projection, 2 streams are wider than d_model"),
        (f"{X}, {Y}", "\n  merge: {type: gated, from: x}", ".merge.from", "`from` has no meaning with type: gated"),
        (f"{X}, {Y}", "\n  merge: {type: cross_attn, from: x}", ".merge",
         "cross_attn is between two streams, not from 'x' to null"),
        (f"{X}, {Y}", "\n  merge: {type: cross_attn, from: x, to: x}", ".merge",
         "cross_attn is between two streams, not from 'x' to 'x'"),
        (f"{X}, {Y}", "\n  merge: {type: cross_attn, from: x, to: z}", ".merge.to", "there is no stream 'z'"),
        (f"{X}, {{stream: y, body: [{{template: a, repeat: 5000}}]}}", "", ".parallel",
         "the schedule has more than 4096 layers"),
    ],
)  # fmt: skip
def test_a_fault_is_named_at_its_place(streams, more, path, what):
    fault = only(changed(parallel(streams, more)))
    assert (fault.dotted, fault.what, fault.category) == (f"layer_schedule[1]{path}", what, Category.VALIDATION)


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ("\n  repeat: 3", ".repeat"),
        ("\n  override: {}", ".override"),
        ("\n  depth_gating: {}", ".depth_gating"),
    ],
)
def test_what_is_not_supported_beside_streams_is_refused_by_name(more, path):
    fault = only(changed(parallel(more=more)))
    assert (fault.dotted, fault.category) == (f"layer_schedule[1]{path}", Category.UNSUPPORTED)


def test_null_merge_and_a_projection_that_is_not_there_are_accepted():
    assert faults(changed(parallel(more="\n  merge: null"))) == []
    assert faults(changed(parallel(more="\n  merge: {type: add, projection: false}"))) == []


def test_a_stream_whose_layer_keeps_no_state_is_named_by_its_layer():
    text = ("ffn: {type: mlp}", "ffn: {type: mlp}\n    state: {kv_cache: false}")
    model = LanguageModel(model_config(stack(parallel(), text, FLOAT32)))
    with pytest.raises(ValueError, match="layer 2: keeps_state is False"):
        model(torch.arange(3)[None], carry=True)


def test_tables_pictures_and_reports_count_the_layers_of_streams():
    streams = stack(parallel(), FLOAT32)
    config = model_config(streams)
    row = summarize(streams, config)[2]
    assert row.mixer == "2 x retnet | attention, window 16, then retnet (concat)"
    assert row.feed_forward == "SwiGLU 256, MLP (gelu) 256"
    layers = sum(each.mixer_parameters + each.feed_forward_parameters for each in summarize(streams, config))
    assert layers + 64 == parameter_counts(config)["layers"]
    assert 3 * 3 * 64 * 256 < row.feed_forward_parameters < row.mixer_parameters * 4
    assert len(row.reach) == 2 * 4 + 1 + 4
    assert "parallel: retnet | attention, retnet" in legend_of(streams, config)
    rules = {finding.rule: finding.message for finding in realism_report(streams)}
    assert rules["layer_count_info"] == "6 layers: 5 retnet, 1 attention"
    assert "unused_template" not in rules
    one_by_one = stack(("- template: a", "- {template: r, repeat: 2}\n- template: a\n- template: r"))
    assert estimate_parameters(streams.spec, streams.layers) == estimate_parameters(one_by_one.spec, one_by_one.layers)
