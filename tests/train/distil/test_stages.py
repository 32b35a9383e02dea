"""Whole distillations of small models: what they write, how they resume, what they refuse."""

import json

import pytest
import torch
from rich.console import Console

from retnet.models.directory import load_model, save_model
from retnet.stack.load import parse_stack
from retnet.train.distil.settings import stage_recipe
from retnet.train.distil.stages import Request, distil
from retnet.train.trainer import PackedTrainer
from tests.train.distil.models import teacher
from tests.train.distil.test_from_stack import STACK

SETTINGS = (
    "length=48", "valid_fraction=0.2", "per_device_train_batch_size=4", "layers.max_steps=2", "logits.max_steps=2",
    "logging_steps=1", "save_strategy=steps", "save_steps=1", "num_samples=0", "learning_rate=2e-3",
)  # fmt: skip
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "teacher"
    save_model(teacher(2), directory)
    return directory


def request(taught, output, texts, **changes):
    options = {"stack": parse_stack(STACK), "data": str(texts), "settings": SETTINGS}
    return Request(taught, output, **(options | changes))


class Stopped(Exception):
    pass


def stop_at(monkeypatch, stage, step):
    """Break the run of a stage off after its step is saved."""
    save = PackedTrainer._save_checkpoint

    def saved_then_stopped(self, model, trial):
        save(self, model, trial)
        if self.options.facts["objective"] == stage and self.state.global_step == step:
            raise Stopped

    monkeypatch.setattr(PackedTrainer, "_save_checkpoint", saved_then_stopped)


@pytest.mark.slow
def test_a_distillation_aligns_chooses_and_trains(taught, short_texts, tmp_path):
    output, options = tmp_path / "out", {"keep_attention": 1}
    outcome = distil(request(taught, output, short_texts, **options), QUIET)
    assert outcome.tokens == (2 + 2) * 4 * 48
    done = json.loads((output / "distil.json").read_text())["done"]
    for i in "01":
        assert done["layers"]["layer_errors"][i] < done["student"]["layer_errors"][i] < 1
    assert list(outcome.attention) == done["chosen"]["kept"]
    assert done["chosen"]["losses"][1] < done["chosen"]["losses"][0]
    mixers = [layer.mixer for layer in load_model(output).config.layers]
    assert [i for i, mixer in enumerate(mixers) if mixer.kind == "attention"] == list(outcome.attention)
    assert [mixer.conv_width for mixer in mixers if mixer.kind == "retention"] == [3]
    assert distil(request(taught, output, short_texts, resume=True, **options), QUIET) == outcome  # nothing is left
    with pytest.raises(ValueError, match="was made with another cross_entropy"):
        distil(request(taught, output, short_texts, resume=True, cross_entropy=0.5, **options), QUIET)


@pytest.mark.slow
def test_stages_that_were_broken_off_end_with_the_same_weights(taught, short_texts, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outcome = distil(request(taught, whole, short_texts), QUIET)
    for stage in ("layers", "logits"):
        with monkeypatch.context() as patch:
            stop_at(patch, stage, 1)
            resume = (broken / "distil.json").exists()
            with pytest.raises(Stopped):
                distil(request(taught, broken, short_texts, resume=resume), QUIET)
    assert distil(request(taught, broken, short_texts, resume=True), QUIET) == outcome
    one, other = load_model(whole).state_dict(), load_model(broken).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_output_that_holds_something_is_left_alone(taught, short_texts, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="a new or empty directory, or --resume"):
        distil(request(taught, tmp_path, short_texts), QUIET)
    with pytest.raises(ValueError, match="keep_attention is 2 of 2 attention layers; accepted: 1 to 1"):
        distil(request(taught, tmp_path / "new", short_texts, keep_attention=2), QUIET)
    with pytest.raises(FileNotFoundError, match=r"holds no distil\.json"):
        distil(request(taught, tmp_path, short_texts, resume=True), QUIET)


def test_after_an_error_before_training_the_output_is_as_it_was(taught, short_texts, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        distil(request(taught, tmp_path / "out", tmp_path / "none"), QUIET)
    save_model(teacher(2, options={"vocab_size": 61, "bos_token_id": None}), tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"narrow has a vocabulary of 61; the tokens of .* need 257"):
        distil(request(tmp_path / "narrow", tmp_path / "out", short_texts, stack=None, keep_attention=1), QUIET)
    broken = teacher(2)
    with torch.no_grad():
        broken.layers[0].mixer.v_proj.weight[0, 0] = torch.nan
    save_model(broken, tmp_path / "broken")
    with pytest.raises(ValueError, match="broken is nan; accepted: a teacher whose weights and logits are finite"):
        distil(request(tmp_path / "broken", tmp_path / "out", short_texts), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("layer.max_steps=3", "is of the stage 'layer'; accepted: layers, logits; did you mean 'layers'?"),
        ("model=x", "model is chosen by the distillation"),
        ("carry_state=true", "carry_state is not supported in distillation"),
        ("lerning_rate=1", "unknown key 'lerning_rate', did you mean 'learning_rate'?"),
        ("max_steps", "'max_steps' is given as a setting; accepted: key=value"),
    ],
)
def test_settings_that_are_not_accepted_say_what_is(word, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        stage_recipe("layers", [word], data="x", model=tmp_path / "none", output=tmp_path)


def test_a_setting_of_one_stage_overrides_that_of_both(tmp_path):
    words = ["learning_rate=1e-4", "logits.learning_rate=2e-4", "layers.max_steps=7"]
    layers, logits = (
        stage_recipe(stage, words, data="x", model=tmp_path / "none", output=tmp_path).training
        for stage in ("layers", "logits")
    )
    assert (layers["learning_rate"], logits["learning_rate"]) == (1e-4, 2e-4)
    assert (layers["max_steps"], layers["num_train_epochs"]) == (7, 1.0)
    assert ("max_steps" in logits, logits["num_train_epochs"]) == (False, 0.75)


def test_a_request_without_a_student_is_refused(taught, tmp_path):
    with pytest.raises(ValueError, match="accepted: a stack, a number of attention layers to keep, or both"):
        Request(taught, tmp_path)
