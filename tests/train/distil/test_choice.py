"""Attention returns first to the layer where its absence costs most."""

import pytest
import torch

from retnet.train.distil.choice import choose_attention, divergence
from retnet.train.distil.student import make_student, retention_of, student_config
from tests.train.distil.models import sample, teacher


def test_layers_are_chosen_by_the_loss_that_is_left():
    taught, samples = teacher(3), [sample(seed=1)]
    mixers = [retention_of(layer.mixer, {}) for layer in taught.config.layers]
    student = make_student(taught, student_config(taught.config, mixers))
    with torch.no_grad():
        student.layers[1].mixer.out_proj.weight.mul_(30)
    own = [layer.mixer for layer in student.layers]
    told = []
    choice = choose_attention(student, taught, [0, 1, 2], 3, samples, lambda done, total: told.append((done, total)))
    assert choice.kept[0] == 1
    assert sorted(choice.kept) == [0, 1, 2]
    assert choice.losses[1] < choice.losses[0]
    assert choice.losses[-1] == pytest.approx(0, abs=1e-6)
    assert told[-1] == (6, 6)
    assert len(told) == 6
    assert [layer.mixer for layer in student.layers] == own
    assert divergence(student, taught, samples) == choice.losses[0]


def test_a_number_of_layers_that_there_are_not_is_refused():
    taught = teacher(2)
    with pytest.raises(ValueError, match=r"3 attention layers of 2; accepted: 1 to 2"):
        choose_attention(taught, taught, [0, 1], 3, [sample()])
