"""Multi-query associative recall: the paper's task, stacks of equal size, and the recipe at micro size."""

from dataclasses import replace

import mqar
import pytest
import torch
from mixers_stacks import PATTERNS, REFERENCE, Size, equal_stacks
from mqar_task import POWER, Recall

from retnet import LanguageModel
from retnet.models.cost import parameter_counts
from retnet.stack.resolve import resolve_config


def drawn(length: int = 64, pairs: int = 16, size: int = 200, seed: int = 0):
    return Recall(length, pairs, 256).batch(size, torch.Generator().manual_seed(seed))


def test_a_sequence_starts_with_pairs_of_distinct_keys_and_distinct_values():
    ids, _, _ = drawn()
    keys, values = ids[:, 0:32:2], ids[:, 1:32:2]
    assert keys.min() >= 1
    assert keys.max() < 128
    assert values.min() >= 128
    assert values.max() < 256
    for tokens in (keys, values):
        assert all(len(set(row.tolist())) == 16 for row in tokens)


def test_every_query_is_a_key_that_came_earlier():
    ids, places, answers = drawn()
    for row, asked, right in zip(ids.tolist(), places.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[0:32:2], row[1:32:2], strict=True))
        assert all(32 <= place < 64 for place in asked)
        assert [pairs[row[place]] for place in asked] == right


def test_each_key_is_queried_once():
    ids, places, _ = drawn()
    assert all(len(set(row)) == 16 for row in places.tolist())
    assert torch.equal(ids.gather(1, places), ids[:, 0:32:2])
    assert not (places % 2).any()


def test_gaps_before_queries_follow_the_power_law():
    """With one query per row, its gap has odds proportional to g^(a - 1)."""
    _, places, _ = drawn(length=64, pairs=1, size=40_000)
    gaps = (places[:, 0] - 2) // 2
    odds = torch.arange(1, 32, dtype=torch.float64) ** (POWER - 1)
    expected = 40_000 * odds / odds.sum()
    seen = torch.bincount(gaps, minlength=31).double()
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 60  # 30 degrees of freedom: 1 in 1000


def test_other_places_hold_tokens_of_the_whole_vocabulary():
    ids, places, _ = drawn()
    other = torch.ones_like(ids, dtype=torch.bool).scatter_(1, places, False)
    other[:, :32] = False
    assert len(ids[other].unique()) == 256


def test_a_seed_gives_one_batch():
    assert all(torch.equal(a, b) for a, b in zip(drawn(seed=1), drawn(seed=1), strict=True))
    assert not torch.equal(drawn(seed=1)[0], drawn(seed=2)[0])


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(63, 4, 256), (64, 17, 256), (64, 0, 256), (256, 4, 256)])
def test_tasks_that_the_paper_does_not_define_are_refused(length, pairs, vocab):
    with pytest.raises(ValueError, match="accepted"):
        Recall(length, pairs, vocab)


def test_the_loss_counts_queries_only():
    """Tokens after a query do not change its loss."""
    config = equal_stacks(Size(32, num_layers=1, vocab_size=256, feed_forward=32), ("attention",))["attention"]
    model, (ids, places, answers) = LanguageModel(config), drawn(size=4)
    loss = mqar.recall_loss(model, ids, places, answers)
    logits = model(ids).logits.gather(1, places[..., None].expand(-1, -1, 256))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    torch.testing.assert_close(loss, expected)
    last = places.max(1).values
    changed = ids.clone()
    for row, place in enumerate(last.tolist()):
        changed[row, place + 1 :] = 7
    torch.testing.assert_close(mqar.recall_loss(model, changed, places, answers), loss)


@pytest.mark.parametrize("size", [Size(), Size(64, 4, 1, 3, 8192, 128), Size(128, 4, 1, 3, 8192, 256)], ids=str)
def test_stacks_have_equal_parameters_within_two_percent(size):
    counts = {name: parameter_counts(config) for name, config in equal_stacks(size, tuple(PATTERNS)).items()}
    assert set(counts) == set(PATTERNS)
    for part in ("total", "layers"):
        parts = [count[part] for count in counts.values()]
        assert max(parts) <= 1.02 * min(parts), part


def test_recurrent_layers_have_equal_memories():
    mixers = {layer.mixer.kind: layer.mixer for layer in equal_stacks(Size())[REFERENCE].layers}
    mamba, retention = mixers["mamba2"], mixers["retention"]
    assert mamba.inner_dim * mamba.state_dim == retention.key_dim * retention.value_dim // retention.num_heads


def test_the_tri_mixer_is_the_preset():
    preset = resolve_config("arch_expert_research_mini")
    assert equal_stacks(Size())[REFERENCE].layers == preset.layers


def test_a_micro_run_gives_measurements_a_plot_and_a_table(tmp_path):
    setting = replace(
        mqar.SETTINGS["tiny"], tasks=((8, 1), (8, 2)), widths=(16,), steps=3, batch=4, tests=8, vocab_size=32,
        rates=(1e-3, 3e-3), stacks=tuple(PATTERNS),
    )  # fmt: skip
    [rows] = mqar.measure(setting, torch.device("cpu"), graphs=False)
    assert len(rows) == 2 * len(PATTERNS) * 2  # rates, stacks, tasks
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert mqar.table(rows).count("\n") == 1 + len(PATTERNS)
    mqar.picture(rows, tmp_path / "mqar.png")
    assert (tmp_path / "mqar.png").stat().st_size > 10_000


def test_the_best_rate_is_chosen_over_all_pairs_and_seeds():
    rows = [
        {"stack": "attention", "width": 16, "rate": rate, "pairs": pairs, "accuracy": accuracy}
        for rate, pairs, accuracy in [(1, 2, 1.0), (1, 4, 0.1), (2, 2, 0.8), (2, 4, 0.5), (2, 4, 0.7)]
    ]
    assert mqar.best(rows) == {("attention", 16): {2: [0.8], 4: [0.5, 0.7]}}


def test_longer_sequences_have_smaller_batches_within_the_tokens_of_a_step():
    setting = replace(mqar.SETTINGS["tiny"], tasks=((32, 2), (64, 4)), batch=8, tokens=256, vocab_size=128)
    stream = mqar.batches(setting, 0, torch.device("cpu"))
    assert [next(stream)[0].shape for _ in range(3)] == [(8, 32), (4, 64), (8, 32)]
    assert replace(setting, tokens=None).sequences(64) == 8


def test_parts_that_ran_apart_are_plotted_together(tmp_path, monkeypatch, capsys):
    for width in (16, 32):
        words = ["tiny", "--widths", width, "--stacks", "RetNet", "--steps", 1, "--out", tmp_path / str(width)]
        monkeypatch.setattr("sys.argv", ["mqar.py", *map(str, words)])
        mqar.main()
    capsys.readouterr()
    words = ["plot", "--from", tmp_path / "16", tmp_path / "32", "--out", tmp_path / "all"]
    monkeypatch.setattr("sys.argv", ["mqar.py", *map(str, words)])
    mqar.main()
    assert capsys.readouterr().out.count("| RetNet |") == 2
    assert (tmp_path / "all" / "mqar.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_short_convolution_learns_to_recall():
    """It reads the previous token. Two layers of plain retention with as many parameters still guess (0.25)."""
    setting = replace(
        mqar.SETTINGS["tiny"], tasks=((16, 2), (16, 4)), steps=400, num_layers=2,
        stacks=("RetNet", "RetNet + conv", "gated RetNet + conv"),
    )  # fmt: skip
    [rows] = mqar.measure(setting, torch.device("cpu"), graphs=False)
    plain, *convolved = (row["accuracy"] for row in rows if row["pairs"] == 4)
    assert plain < 0.45
    assert min(convolved) > 0.6


@pytest.mark.slow
def test_a_hybrid_learns_to_recall():
    """Retention reads the previous token and attention the pair. A guess among the values would give 0.25."""
    setting = replace(
        mqar.SETTINGS["tiny"], tasks=((16, 2), (16, 4)), rates=(3e-3,), steps=800, stacks=("RetNet + attention",)
    )
    [rows] = mqar.measure(setting, torch.device("cpu"), graphs=False)
    assert min(row["accuracy"] for row in rows) > 0.9
