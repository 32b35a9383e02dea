"""`optim=muon` of a recipe: its arguments, a run that resumes bit for bit, several processes, schedules."""

from __future__ import annotations

import pytest

from retnet.train.inputs import initial_model, open_data
from retnet.train.muon_recipe import MuonArgs
from retnet.train.optimizer import complete_schedule
from retnet.train.run import train
from retnet.train.trainer import PackedTrainer, RunOptions

from .conftest import losses, recipe_for, weights
from .test_run_distributed import FSDP, assert_same_run, train_on_processes, words_for
from .test_run_distributed import SETTINGS as PROCESSES

MUON = {"optim": "muon", "optim_args": "momentum=0.9,adamw_lr_multiplier=0.5"}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def test_the_arguments_of_a_recipe_are_those_of_the_optimizer():
    assert MuonArgs.parse(None) == MuonArgs.parse("") == MuonArgs(0.95, True, 5, "auto", 1.0)
    assert MuonArgs.parse("momentum=0.9, nesterov=False, ns_steps=3, ns_dtype=float32") == MuonArgs(
        0.9, False, 3, "float32"
    )


REFUSED = [
    ("momentun=0.9", "unknown key 'momentun' in optim_args of muon, did you mean 'momentum'?"),
    ("x=1", "unknown key 'x'.*accepted: momentum, nesterov, ns_steps, ns_dtype, adamw_lr_multiplier, ns_coefs"),
    ("ns_dtype=int8", "ns_dtype is 'int8'; accepted: auto, float32, bfloat16"),
    ("momentum", "momentum is ''.*accepted: a number"),
    ("momentum=1", "momentum is 1.0; accepted: 0 or more, and below 1"),
    ("momentum=nan", "momentum is nan"),
    ("nesterov=1", "nesterov is '1'.*accepted: true or false"),
    ("ns_steps=2.5", "ns_steps is '2.5'.*accepted: an integer"),
    ("adamw_lr_multiplier=inf", "adamw_lr_multiplier is inf"),
    ("ns_steps=3,ns_steps=4", "given twice"),
    ("ns_coefs=1:2", r"ns_coefs is \(1.0, 2.0\); accepted: three finite numbers"),
    ("ns_coefs=1:2:x", "ns_coefs is '1:2:x'.*accepted: numbers"),
    ("stabilize_steps=-1", "stabilize_steps is -1; accepted: 0 to 99"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_a_wrong_argument_is_refused_by_the_recipe(byte_model, text_folder, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(byte_model, text_folder, tmp_path, optim="muon", optim_args=text)


def test_a_run_trains_and_resumes_bit_for_bit(dropout_model, text_folder, tmp_path, console, monkeypatch):
    """With accumulation and clipping. Stopped at step 4 of 6, after the log says what is trained with what."""
    made = []
    original = PackedTrainer.create_optimizer
    monkeypatch.setattr(
        PackedTrainer, "create_optimizer", lambda self, *a, **k: made.append(original(self, *a, **k)) or made[-1]
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = MUON | SAVING | {"max_steps": 6, "weight_decay": 0.1}
    train(recipe_for(dropout_model, text_folder, whole, **settings), console)
    first = losses(whole)
    assert first[6] < first[1] - 0.3
    groups = made[0].param_groups
    assert {(g["algorithm"], g["initial_lr"]) for g in groups} == {("muon", 1e-2), ("adamw", 5e-3)}
    assert {g["momentum"] for g in groups} == {0.9}
    train(
        recipe_for(dropout_model, text_folder, stopped, **settings, resume_from_checkpoint=whole / "checkpoint-4"),
        console,
    )
    assert losses(stopped) == losses(whole)
    assert weights(stopped) == weights(whole)


def test_another_optimizers_checkpoint_is_refused(dropout_model, text_folder, tmp_path, console):
    settings = SAVING | {"max_steps": 2}
    train(recipe_for(dropout_model, text_folder, tmp_path, **settings), console)
    with pytest.raises(ValueError, match="optim was 'adamw_torch_fused' and is 'muon'"):
        train(
            recipe_for(dropout_model, text_folder, tmp_path, **settings, optim="muon", resume_from_checkpoint="auto"),
            console,
        )


@pytest.fixture
def one_process(byte_model, text_folder, tmp_path, console):
    settings = PROCESSES | MUON | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    train(recipe_for(byte_model, text_folder, tmp_path / "one", **settings), console)
    return tmp_path / "one"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [{}, FSDP], ids=["DDP", "FSDP"])
def test_two_processes_train_as_one_and_resume(byte_model, text_folder, tmp_path, one_process, sharding):
    settings = PROCESSES | MUON | sharding | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    output, resumed = tmp_path / "two", tmp_path / "resumed"
    train_on_processes(2, words_for(byte_model, text_folder, output, **settings))
    assert_same_run(output, one_process)
    train_on_processes(
        2, words_for(byte_model, text_folder, resumed, **settings, resume_from_checkpoint=output / "checkpoint-2")
    )
    assert_same_run(resumed, one_process)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, {"num_decay_steps": 20, "decay_type": "linear"}),
        ({"num_decay_steps": 0.35}, {"num_decay_steps": 35, "decay_type": "linear"}),
        ({"num_decay_steps": 7, "decay_type": "1-sqrt"}, {"num_decay_steps": 7, "decay_type": "1-sqrt"}),
    ],
)
def test_the_decay_of_a_stable_schedule_is_a_share_of_the_run(arguments, expected):
    assert complete_schedule("warmup_stable_decay", arguments, 5, 100) == expected
    assert complete_schedule("linear", arguments, 5, 100) == arguments


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        (-1, "is -1; accepted"),
        (1.5, "is 1.5; accepted"),
        ("x", "is 'x'; accepted"),
        (0.97, "5 steps of warm-up and 97"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(decay, message):
    with pytest.raises(ValueError, match=message):
        complete_schedule("warmup_stable_decay", {"num_decay_steps": decay}, 5, 100)


def trainer_for(model, data, output, **settings) -> PackedTrainer:
    recipe = recipe_for(model, data, output, **settings)
    arguments = recipe.training_arguments()
    corpora = open_data(recipe, arguments)
    options = RunOptions(max_minutes=recipe.max_minutes)
    return PackedTrainer(initial_model(recipe, corpora.corpus, 0), arguments, corpora.train, corpora.valid, options)


@pytest.mark.parametrize("kwargs", [None, "{num_decay_steps: 0.4, decay_type: cosine}"])
def test_the_rate_of_a_recipe_is_stable_and_then_falls(byte_model, text_folder, tmp_path, kwargs):
    given = {} if kwargs is None else {"lr_scheduler_kwargs": kwargs}
    settings = MUON | given | {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.1, "learning_rate": 1.0}
    trainer = trainer_for(byte_model, text_folder, tmp_path, **settings)
    arguments = trainer.args.lr_scheduler_kwargs
    scheduler = trainer.create_scheduler(100, trainer.create_optimizer())
    rates = [scheduler.lr_lambdas[0](step) for step in range(101)]
    first = 60 if kwargs else 80
    assert rates[5] == 0.5
    assert rates[10 : first + 1] == [1.0] * (first - 9)
    assert rates[(first + 100) // 2] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0, abs=1e-9)
    assert set(scheduler.base_lrs) == {1.0, 0.5}
    assert trainer.args.lr_scheduler_kwargs is arguments


def test_a_time_limit_moves_the_decay_to_its_end(byte_model, text_folder, tmp_path):
    settings = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0, "max_minutes": 1}
    trainer = trainer_for(byte_model, text_folder, tmp_path, **settings)
    rate = trainer.create_scheduler(1000, trainer.create_optimizer()).lr_lambdas[0]
    trainer.clock.start(0.0)
    for seconds, expected in ((30, 1.0), (54, 0.5), (60, 0.0)):
        trainer.clock.seconds = seconds
        assert rate(10) == pytest.approx(expected)


def test_a_schedule_that_does_not_fit_names_its_key(byte_model, text_folder, tmp_path):
    settings = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": "{num_decay_steps: 200}"}
    trainer = trainer_for(byte_model, text_folder, tmp_path, **settings)
    with pytest.raises(ValueError, match=r"lr_scheduler_type is 'warmup_stable_decay' with.*and 200 of decay are more"):
        trainer.create_scheduler(100, trainer.create_optimizer())
