"""Small versions of stacks for tests: the same templates and overrides, with smaller widths and fewer layers."""

from dataclasses import replace

from retnet.models.lm import LanguageModel
from retnet.stack import Stack
from retnet.stack.build import model_config
from retnet.stack.layers import expand
from retnet.stack.schema import ParallelEntry
from tests.small_models import unit_gain_

WIDTH, MAX_LAYERS, WINDOW = 64, 4, 6


def shrunk(stack: Stack) -> Stack:
    """A few layers of width 64 in float32, with every template and override of the schedule."""
    spec, model = stack.spec, stack.spec.model
    group = model.n_heads // model.kv_heads
    heads = {1: 4, model.n_heads: 4}.get(group, 2 * min(group, 2))
    model = model.model_copy(update={
        "d_model": WIDTH, "n_heads": heads, "n_kv_heads": max(1, heads // group), "vocab_size": 97, "max_seq_len": 64,
        "mlp_ratio": min(model.mlp_ratio, 2), "dtype": "float32",
    })  # fmt: skip
    templates = {name: _narrow(template) for name, template in spec.layer_templates.items()}
    entries = [*{_kind(entry): _once(entry) for entry in spec.layer_schedule}.values()]
    entries += entries[: max(0, MAX_LAYERS - len(entries))]
    spec = spec.model_copy(update={"model": model, "layer_templates": templates, "layer_schedule": entries})
    return replace(stack, spec=spec, layers=expand(spec))


def _kind(entry):
    """What tells the layers of entries apart; streams are a kind of their own."""
    return id(entry) if isinstance(entry, ParallelEntry) else (entry.template, entry.override)


def _once(entry):
    return entry if isinstance(entry, ParallelEntry) else entry.model_copy(update={"repeat": 1})


def _narrow(template):
    """Windows and chunks shorter than the test sequences, so that sequences cross both."""
    mixer = template.mixer
    changes = {}
    if mixer.attention and mixer.attention.window:
        changes["attention"] = mixer.attention.model_copy(update={"window": WINDOW})
    if mixer.retnet:
        changes["retnet"] = mixer.retnet.model_copy(update={"chunk_size": min(mixer.retnet.chunk_size, 8)})
    if mixer.mamba:
        changes["mamba"] = mixer.mamba.model_copy(update={"d_state": min(mixer.mamba.d_state, 16)})
    return template.model_copy(update={"mixer": mixer.model_copy(update=changes)})


def shrunk_model(stack: Stack) -> LanguageModel:
    return unit_gain_(LanguageModel(model_config(shrunk(stack))).eval())
