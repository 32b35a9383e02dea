"""The effect of a learned state: its windows are those of the decays, and its losses those of single documents."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from retnet.models.cost import head_windows
from retnet.train.state_effect import Span, StateEffect, longest_windows, pieces, state_effect
from retnet.train.state_tuning import StateTunedForCausalLM
from tests.models.test_initial_state import learned
from tests.small_models import CONV, MAMBA1, MAMBA2, PAPER, random_ids, small_model


def tuned(stack) -> StateTunedForCausalLM:
    packed = StateTunedForCausalLM.trainable(small_model(stack))
    packed.initial.load_state_dict(learned(packed.model).state_dict())
    return packed


def row(*documents: int, filling: int = 0) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in (*documents, *([filling] if filling else []))])
    ids = random_ids(len(positions))
    targets = ids.roll(-1)
    targets[positions.roll(-1) == 0] = -100
    targets[len(ids) - filling :] = -100
    return {"input_ids": ids, "position_ids": positions, "shift_labels": targets}


def test_windows_of_fixed_decays_are_those_of_their_formula():
    packed = tuned([PAPER, PAPER])
    found = longest_windows(packed, [random_ids(50), random_ids(31)], torch.device("cpu"))
    assert found == {i: max(windows) for i, windows in enumerate(head_windows(packed.model.config))}


def test_windows_that_the_input_decides_are_those_of_the_decays_that_it_gets():
    packed, ids, inner = tuned([CONV, MAMBA2, MAMBA1]), random_ids(40), []
    model = packed.model
    found = longest_windows(packed, [ids], torch.device("cpu"))
    with torch.no_grad():
        model.hidden(ids[None], packed.initial(model, 1), inner=inner)
        rate = model.layers[0].mixer.log_decay(model.layers[0].mixer_norm(inner[0])).mean(1).max()
    assert found[0] == pytest.approx(float(torch.tensor(0.01).log() / rate), abs=1)
    assert all(1 < tokens < 1e5 for tokens in found.values())


def test_losses_by_position_are_those_of_each_document_alone():
    packed, rows = tuned([CONV, PAPER]), [row(5, 9, filling=3), row(17)]
    assert [len(ids) for ids in pieces(rows)] == [5, 9, 17]
    effect = state_effect(packed, rows, [5, 9, 17])
    sums: dict[int, list[float]] = {}
    for ids in pieces(rows):
        for column, state in enumerate((None, packed.initial(packed.model, 1))):
            logits = packed.model(ids[None], state).logits[0, :-1]
            for position, nats in enumerate(F.cross_entropy(logits, ids[1:], reduction="none").tolist()):
                sums.setdefault(position.bit_length(), [0, 0, 0])[column] += nats
                sums[position.bit_length()][2] += column
    assert [span.tokens for span in effect.spans] == [sums[i][2] for i in sorted(sums)]
    for i, span in enumerate(effect.spans):
        assert span.without == pytest.approx(sums[i][0] / sums[i][2], rel=1e-5)
        assert span.with_state == pytest.approx(sums[i][1] / sums[i][2], rel=1e-5)
    assert [(s.first, s.last) for s in effect.spans] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert effect.document_tokens == 9


@pytest.mark.parametrize(("tokens", "warned"), [(400, False), (600, True)])
def test_a_layer_that_forgets_the_state_before_a_document_ends_is_warned_of(tokens, warned):
    effect = StateEffect([Span(0, 0, 1, 2.0, 1.0)], {0: float("inf"), 3: 500.0}, tokens)
    console = Console(file=io.StringIO(), width=200)
    effect.show(console)
    shown = console.file.getvalue()
    assert "-1.0000" in shown
    assert ("layer 3 (500)" in shown) is warned
    assert ("warning" in shown) is warned
