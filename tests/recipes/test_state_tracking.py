"""Sums modulo a number: the task, and a run of all stacks at micro size."""

from dataclasses import replace

import pytest
import state_tracking
import torch

CPU = torch.device("cpu")


def test_labels_are_the_sums_so_far():
    digits, sums = state_tracking.strings(3, 7, 5, torch.Generator().manual_seed(0))
    for row, expected in zip(digits.tolist(), sums.tolist(), strict=True):
        assert expected == [sum(row[: i + 1]) % 3 for i in range(7)]


def test_accuracy_is_that_of_the_second_half():
    class FirstHalfOnly:
        def __call__(self, digits):
            sums = digits.cumsum(1) % 2
            sums[:, :4] = 1 - sums[:, :4]
            return type("Output", (), {"logits": torch.nn.functional.one_hot(sums, 2).float()})

    assert state_tracking.accuracy(FirstHalfOnly(), 2, 8, 4, CPU) == 1


def test_a_micro_run_measures_every_stack():
    stacks = tuple(state_tracking.STACKS)
    small = {"steps": 8, "width": 8, "lengths": (8, 16), "digits": 40, "tests": 4}
    setting = replace(state_tracking.SETTINGS["quick"], stacks=stacks, moduli=(3,), **small)
    [rows] = state_tracking.measure(setting, CPU, graphs=False)
    assert len(rows) == 2 * len(stacks)
    assert state_tracking.table(rows).count("\n") == 1 + len(stacks)


@pytest.mark.slow
def test_signed_decays_learn_parity_and_gated_retention_does_not():
    setting = replace(state_tracking.SETTINGS["quick"], steps=800, stacks=("gated", "signed"), moduli=(2,))
    [rows] = state_tracking.measure(setting, CPU, graphs=False)
    found = {(row["stack"], row["length"]): row["accuracy"] for row in rows}
    assert found["signed", 160] > 0.95
    assert found["gated", 160] < 0.6
