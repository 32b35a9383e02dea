"""The comparison of mixers in language models: a run at micro size, its windows, buckets and learning rates."""

from dataclasses import replace

import mixers
import pytest
import torch
from mixers_stacks import WITHOUT_CONVOLUTION
from mixers_train import Run, learning_rate

from retnet.data import DOCUMENT_START, find_documents


def test_a_micro_run_gives_measurements_a_plot_and_a_table(tmp_path):
    (tmp_path / "text.txt").write_text("the same words again and again. " * 100)
    setting = mixers.SETTINGS["tiny"]
    setting = replace(
        setting, size=replace(setting.size, d_model=16, feed_forward=16), length=16, batch=2, steps=2, tests=2, points=2
    )
    found = mixers.measure(setting, str(tmp_path / "text.txt"), torch.device("cpu"), graphs=False)
    assert set(found["curves"]) == set(WITHOUT_CONVOLUTION)
    assert all([tokens for tokens, _ in line] == [32, 64] for line in found["curves"].values())
    assert all([last for last, _ in line] == [16, 32, 64] for line in found["positions"].values())
    recall = [{"stack": "attention", "width": 8, "rate": 1, "pairs": pairs, "accuracy": pairs / 8} for pairs in (2, 4)]
    text = mixers.table(found, recall)
    assert text.count("\n") == 1 + len(WITHOUT_CONVOLUTION)
    assert "| 50 (4 pairs) |" in text
    mixers.picture(found, tmp_path / "mixers.png")
    assert (tmp_path / "mixers.png").stat().st_size > 10_000


def test_each_document_begins_with_the_document_start(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b.txt").write_text("c")
    tokens = mixers.tokens_of(find_documents(tmp_path), torch.device("cpu"))
    assert tokens.tolist() == [DOCUMENT_START, 97, 98, DOCUMENT_START, 99]
    assert mixers.windows(tokens, torch.tensor([0, 2]), 2).tolist() == [[DOCUMENT_START, 97], [98, DOCUMENT_START]]


def test_positions_are_averaged_between_powers_of_two():
    assert mixers.bucketed(torch.arange(1.0, 65)) == [(16, 8.5), (32, 24.5), (64, 48.5)]


def test_bits_per_position_are_the_mean_over_windows():
    from retnet import LanguageModel

    size = mixers.SETTINGS["tiny"].size
    config = mixers.equal_stacks(replace(size, d_model=16, feed_forward=16), ("RetNet",))["RetNet"]
    model, tokens = LanguageModel(config), torch.randint(256, (200,), generator=torch.Generator().manual_seed(0))
    bits = mixers.bits_by_position(model, tokens, tests=3, length=8)
    starts = torch.linspace(0, 200 - 8 - 2, 3).long()
    ids = torch.stack([tokens[start : start + 9] for start in starts.tolist()])
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(bits, loss.double().mean(0) / torch.log(torch.tensor(2.0)).double(), rtol=1e-6, atol=0)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.gpu
def test_a_captured_step_trains_as_an_eager_one():
    device = torch.device("cuda")
    config = mixers.equal_stacks(mixers.SETTINGS["tiny"].size, ("tri-mixer",))["tri-mixer"]
    ids = torch.randint(256, (8, 4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for graphs in (False, True):
        run = Run("tri-mixer", config, 1e-3, mixers.next_byte_loss, device, graphs)
        for batch in ids:
            run.step((batch,), 1e-3)
        run.wait()
        losses.append(torch.stack(run.losses))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
