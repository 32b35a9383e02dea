"""The comparison of quality: names of stacks and arms, token streams, a run at micro size, its tables and its queue."""

import argparse
import json
import lzma
import sys
from dataclasses import replace

import numpy as np
import pytest
import quality
import quality_data
import quality_measure
import quality_report
import quality_rows
import quality_train
import torch
from quality_run import TINY, Session
from quality_stacks import BASES, CHANGES, SHAPES, Shape, stack

from retnet import LanguageModel
from retnet.data import DOCUMENT_START
from retnet.models.cost import parameter_counts
from tests.paths import ROOT

TINY_SHAPE, TINY_SIZES = SHAPES["tiny"], TINY["sizes"]


def options(out, **given) -> argparse.Namespace:
    common = {"tiny": True, "eager": True, "steps": 4, "out": out, "commit": "test", "deadline": None, "abandon": None,
              "done": []}  # fmt: skip
    return argparse.Namespace(**common | given)


def arm(name: str = "retnet:adamw:3e-3:0", steps: int = 4) -> quality_train.Arm:
    return quality_train.Arm.parse(name, steps)


def row(name: str, loss: float | None, status: str = "done", **more) -> dict:
    one = arm(name)
    point = {"step": 4, "tokens": 512, "seconds": 1.0, "train": 2.0, "valid": loss or 9.0}
    found = {key: getattr(one, key) for key in ("stack", "optimizer", "rate", "seed", "steps")} | {"arm": one.name}
    found |= {
        "status": status,
        "curve": [point],
        "data": "d",
        "shape": "tiny",
        "length": 32,
        "rows_per_step": 4,
        "device": "cpu",
    }
    found |= {"parameters": 100, "tokens_per_second": 10.0}
    if loss is not None:
        found |= {"valid_loss": loss, "perplexity": 2.718281828459045**loss}
    return found | more


@pytest.mark.parametrize("shape", [shape for name, shape in SHAPES.items() if name != "tiny"], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_stacks_have_equal_parameters_within_one_percent(name, shape):
    counts = [parameter_counts(stack(each, shape))["total"] for each in ("retnet", name)]
    assert max(counts) <= 1.01 * min(counts)


def test_the_paper_and_the_llama_are_those_of_the_presets():
    from retnet.models.presets import preset
    from retnet.stack.resolve import resolve_config

    assert stack("retnet", Shape()).layers == preset("retnet-125m").layers
    assert stack("gated", Shape()).layers == preset("retnet-125m-gated").layers
    rival = resolve_config(str(ROOT / "recipes" / "llama-125m.yml"))
    assert stack("llama", Shape()).layers == rival.layers


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_keeps_the_parameters_and_changes_the_layers(change):
    base = "llama" if change in ("nope", "mha", "attention-gate", "init-paper", "layer", "gelu") else "gated"
    base = "retnet" if change in ("init-normal", "alibi", "layer-decay") else base
    before = stack(base, TINY_SHAPE)
    after = stack(f"{base}+{change}", TINY_SHAPE)
    assert replace(after, name=before.name) != before
    counts = [parameter_counts(config)["total"] for config in (before, after)]
    assert max(counts) <= 1.02 * min(counts)
    LanguageModel(after)


@pytest.mark.parametrize(
    "name", ["rwkv", "llama+fast", "mamba2+sigmoid", "llama+conv", "llama+heads6", "llama+narrow", "gated+mha"]
)
def test_names_that_describe_no_stack_are_refused(name):
    with pytest.raises(ValueError, match=r"accepted|the stack has no"):
        stack(name, TINY_SHAPE)


@pytest.mark.parametrize(
    "name", ["llama", "llama:sgd:1:0", "llama:adamw:x:0", "llama:adamw:0:0", "llama:adamw:1:0:0", "llama:adamw:nan:0"]
)
def test_texts_that_are_no_arm_are_refused(name):
    with pytest.raises(ValueError, match="accepted"):
        arm(name)


def test_an_arm_has_one_name_however_it_is_written():
    assert arm("a+b:muon:0.004:1").name == arm("a+b:muon:4e-3:1:4").name == "a+b:muon:0.004:1:4"


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [quality_train.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == rates[5] == 1.0
    assert rates[100] == 0
    assert rates[52] == pytest.approx(48 / 95)


@pytest.mark.parametrize("name", ["llama+qk-rms", "hybrid+attention-gate", "gated-conv+start"])
def test_a_stack_of_new_values_trains_under_both_optimizers(name, tmp_path):
    session = Session(options(tmp_path / "rows"), 0.0)
    for kind in quality_train.OPTIMIZERS:
        assert session.run(arm(f"{name}:{kind}:1e-3:0"), final=False)["status"] == "done"


@pytest.mark.parametrize("kind", quality_train.OPTIMIZERS)
def test_every_parameter_has_one_group(kind):
    model = LanguageModel(stack("tri-mixer", TINY_SHAPE))
    groups = quality_train.optimizer_of(model, kind).param_groups
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "embedding.weight" in names
    assert "layers.0.mixer.in_proj.weight" in names
    assert not any("norm" in name or "conv" in name or "bias" in name for name in names)


def test_packed_streams_are_the_tokens_of_the_folder(tmp_path):
    """Parts of at most the given size, in order; a missing last part shortens train, a changed one is an error."""
    from retnet.data.build import build_shards
    from retnet.data.shards import ShardFolder

    generator = np.random.default_rng(0)
    for name in quality_data.STREAMS:
        source = tmp_path / "text" / name
        source.mkdir(parents=True)
        for n in range(3):
            (source / f"{n}.txt").write_bytes(generator.integers(97, 123, 700 + 100 * n, dtype=np.uint8).tobytes())
        build_shards([str(source)], tmp_path / name, workers=1)
    folders = {name: tmp_path / name for name in quality_data.STREAMS}
    out = tmp_path / "packed"
    quality_data.pack(folders, out, part_bytes=600)
    parts = sorted(out.glob("train.*.xz"))
    assert len(parts) > 2
    assert all(part.stat().st_size <= 600 for part in parts)
    corpus = quality_data.load(out, torch.device("cpu"))
    folder = ShardFolder(folders["train"])
    assert corpus.train.tokens.tolist() == np.concatenate([folder.shard_tokens(0)]).tolist()
    assert corpus.books.num_bytes == (700, 800, 900)
    assert corpus.books.document(1).tolist() == ShardFolder(folders["books"]).tokens(1, 0, 801).tolist()
    assert (
        quality_data.load(out, torch.device("cpu"), 1000).train.tokens.tolist() == corpus.train.tokens[:1000].tolist()
    )
    parts[-1].unlink()
    assert len(quality_data.load(out, torch.device("cpu")).train.tokens) < len(corpus.train.tokens)
    parts[0].write_bytes(lzma.compress(b"other"))
    with pytest.raises(ValueError, match="damaged"):
        quality_data.load(out, torch.device("cpu"))


def test_the_fingerprint_is_of_the_tokens_for_training_and_validation():
    stream = quality_data.Stream(torch.arange(9, dtype=torch.int32), (9,), (8,))
    other = replace(stream, tokens=stream.tokens + 1)
    corpus = quality_data.Corpus(20, stream, stream, stream, stream)
    assert corpus.fingerprint() == replace(corpus, books=other).fingerprint()
    prints = {
        corpus.fingerprint(),
        replace(corpus, train=other).fingerprint(),
        replace(corpus, valid=other).fingerprint(),
    }
    assert len(prints) == 3


def test_rows_hold_consecutive_tokens_and_their_targets():
    stream = quality_data.Stream(torch.arange(10, dtype=torch.int32), (4, 10), (3, 5))
    assert stream.rows(3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert stream.spread_rows(3, 2).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert stream.document(1).tolist() == [4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="accepted"):
        stream.spread_rows(10, 2)


def test_every_row_comes_once_per_pass_in_an_order_of_the_seed():
    rows = torch.arange(14, dtype=torch.int32).view(7, 2)
    order = [
        torch.cat([next(b) for _ in range(7)]) for b in (quality_data.batches(rows, 2), quality_data.batches(rows, 2))
    ]
    assert torch.equal(*order)
    first, second = order[0][:7], order[0][7:]
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == rows[:, 0].tolist()
    assert first.tolist() != second.tolist()


def test_losses_are_the_cross_entropy_of_each_token(monkeypatch):
    monkeypatch.setattr(quality_measure, "LOGIT_ROWS", 5)
    model = LanguageModel(stack("retnet", TINY_SHAPE))
    ids = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    found = quality_measure.row_nats(model, ids, replace(TINY_SIZES, tokens=8))
    logits = model(ids[:, :-1].long()).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:].long(), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bits_per_byte_count_every_token_of_whole_books_once():
    model = LanguageModel(stack("retnet", TINY_SHAPE))
    tokens = torch.randint(256, (70,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tokens[[0, 40]] = DOCUMENT_START
    books = quality_data.Stream(tokens, (40, 70), (39, 29))
    found = quality_measure.bits_per_byte(model, books, TINY_SIZES, 16)
    total = 0.0
    for book in (tokens[:40], tokens[40:]):
        for start in range(0, len(book) - 1, 16):
            part = book[start : start + 17].long()[None]
            total += model.loss(part[:, :-1], part[:, 1:]).item() * (part.shape[1] - 1)
    assert found == pytest.approx(total / (68 * np.log(2)), rel=1e-5)


def test_a_repeat_is_found_by_a_model_that_copies(monkeypatch):
    """Losses of the passage are those at its own places, before and after the gap."""
    tokens = torch.arange(500, dtype=torch.int32)
    sizes = replace(TINY_SIZES, passage=4, gaps=(6,), repeats=2)
    monkeypatch.setattr(quality_measure, "row_nats", lambda model, rows, sizes: rows[:, 1:].float())
    books = quality_data.Stream(tokens, (500,), (500,))
    [found] = quality_measure.recall(None, books, sizes)
    starts = [0, 500 - 14 - 1]
    assert found["gap"] == 6
    assert found["first"] == found["again"] == np.mean([[start + 4 + i for i in range(4)] for start in starts])


def test_a_finalist_at_micro_size_is_measured_and_reported(tmp_path):
    session = Session(options(tmp_path / "rows"), 0.0)
    for name in ("llama:adamw:3e-3:0", "retnet:adamw:3e-3:0"):
        found = session.run(arm(name), final=True)
        assert found["status"] == "done"
        assert found["errors"] == {}
        assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4]
        assert set(found["final"]) == set(quality_measure.FINAL)
        assert [last for last, _ in found["final"]["positions"]] == [32, 64, 128]
    rows = quality_rows.load_rows([tmp_path / "rows"])
    assert len(rows) == 2
    text = quality_report.tables(rows)
    assert "| retnet | adamw |" in text
    quality_report.picture(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_runs_of_one_arm_are_equal_and_the_seed_changes_weights_only(tmp_path):
    session = Session(options(tmp_path / "rows"), 0.0)
    losses = [session.run(arm(f"gated:adamw:1e-3:{seed}"), final=False)["valid_loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_muon_trains(tmp_path):
    found = Session(options(tmp_path / "rows", steps=8), 0.0).run(arm("retnet:muon:1e-2:0", 8), final=False)
    assert found["curve"][-1]["valid"] < found["curve"][0]["valid"]


def test_a_queue_runs_each_arm_once_and_goes_on_after_a_failure(tmp_path, capsys):
    queue = tmp_path / "arms.txt"
    queue.write_text("retnet:adamw:3e-3:0   # first\n\nmamba2+sigmoid:adamw:1e-3:0\nllama:adamw:1e-3:0 final\n")
    arms = quality_rows.read_queue(queue, 2)
    assert [(one.name, final) for one, final in arms] == [
        ("retnet:adamw:0.003:0:2", False), ("mamba2+sigmoid:adamw:0.001:0:2", False), ("llama:adamw:0.001:0:2", True),
    ]  # fmt: skip
    session = Session(options(tmp_path / "rows"), 0.0)
    with quality_rows.claimed(session.out, arms[0][0]) as mine:  # another process runs it
        assert mine
        session.work_off([arms[0]])
    assert quality_rows.load_rows([session.out]) == []
    session.work_off(arms)
    status = {found["stack"]: found["status"] for found in quality_rows.load_rows([session.out])}
    assert status == {"retnet": "done", "mamba2+sigmoid": "failed", "llama": "done"}
    ran = capsys.readouterr().out.count("in all")
    session.work_off(arms)
    assert capsys.readouterr().out.count("in all") == 1  # the failed one again
    assert ran == 3


def test_arms_that_an_earlier_run_finished_on_the_same_data_are_not_run_again(tmp_path, monkeypatch):
    first = Session(options(tmp_path / "first"), 0.0)
    found = first.run(arm("retnet:adamw:3e-3:0", 2), final=False)
    collected = tmp_path / "rows.jsonl"
    others = (
        {"arm": "llama:adamw:0.001:0:2", "data": "of another corpus"},
        {"arm": "gated:adamw:0.001:0:2", "status": "stopped"},
    )
    collected.write_text("\n".join(json.dumps(found | other) for other in ({}, *others)))
    second, order = Session(options(tmp_path / "second", done=[collected]), 0.0), []
    monkeypatch.setattr(second, "run", lambda one, final: order.append(one.stack))
    second.work_off(
        [
            (arm(f"{name}:adamw:{rate}:0", 2), False)
            for name, rate in (("retnet", 3e-3), ("llama", 1e-3), ("gated", 1e-3))
        ]
    )
    assert order == ["llama", "gated"]
    assert quality_rows.load_rows([second.out]) == [found]


def test_arms_of_the_stack_that_ran_last_come_first_among_the_next_few(tmp_path, monkeypatch):
    session, order = Session(options(tmp_path / "rows"), 0.0), []
    monkeypatch.setattr(session, "run", lambda one, final: order.append(one.name[0] + one.name.split(":")[3]))
    names = ["a:adamw:1:0", "b:adamw:1:0", "a:adamw:1:1", *(f"c:adamw:1:{n}" for n in range(6)), "b:adamw:1:1"]
    session.work_off([(arm(name), False) for name in names])
    assert order == ["a0", "a1", "b0", "c0", "c1", "c2", "c3", "c4", "c5", "b1"]


@pytest.mark.parametrize("file", ["quality_sweep.txt", "quality_finals.txt"])
def test_the_arms_of_a_queue_are_arms_of_known_stacks_each_once(file):
    names = [one.name for one, _ in quality_rows.read_queue(ROOT / "recipes" / file, 480)]
    assert len(set(names)) == len(names) > 10
    for stack_name in {name.split(":")[0] for name in names}:
        assert stack(stack_name, TINY_SHAPE).name == stack_name


def test_a_line_that_is_no_arm_is_named(tmp_path):
    (tmp_path / "arms.txt").write_text("retnet:adamw:1:0 twice")
    with pytest.raises(ValueError, match=r"arms\.txt:1.*accepted"):
        quality_rows.read_queue(tmp_path / "arms.txt", 4)


def test_an_arm_far_above_the_best_is_abandoned_at_half(tmp_path):
    session = Session(options(tmp_path / "rows", abandon=0.05), 0.0)
    session.run(arm("retnet:adamw:1e-2:0"), final=False)
    found = session.run(arm("retnet:adamw:1e-6:0"), final=False)
    assert found["status"] == "abandoned"
    assert [point["step"] for point in found["curve"]] == [1, 2]
    assert "the best has" in found["note"]


def test_a_deadline_stops_an_arm_and_keeps_its_curve(tmp_path):
    session = Session(options(tmp_path / "rows", deadline=-1.0), 0.0)
    found = session.run(arm(), final=False)
    assert found["status"] == "stopped"
    assert len(found["curve"]) == 1
    session.work_off([(arm("gated:adamw:1e-3:0"), False)])
    assert len(quality_rows.load_rows([session.out])) == 1


def test_the_best_rate_is_marked_and_an_edge_is_named():
    rows = [row(f"llama:adamw:{rate}:0", loss) for rate, loss in (("1e-3", 3.0), ("2e-3", 2.5), ("4e-3", 2.0))]
    rows += [row(f"retnet:adamw:{rate}:0", loss) for rate, loss in (("1e-3", 3.0), ("2e-3", 2.0), ("4e-3", 2.5))]
    lines = quality_report.sweep_table(rows).splitlines()
    assert lines[2] == "| llama | 20.1 | 12.2 | **7.4** | adamw: best at an edge |"
    assert lines[3] == "| retnet | 20.1 | **7.4** | 12.2 |  |"


def test_a_rate_that_was_abandoned_counts_as_tried():
    rows = [
        row("llama:adamw:1e-3:0", 3.0),
        row("llama:adamw:2e-3:0", 2.0),
        row("llama:adamw:4e-3:0", None, "abandoned"),
    ]
    assert "edge" not in quality_report.sweep_table(rows).splitlines()[2]
    assert "abandoned at 4" in quality_report.sweep_table(rows)


def test_results_are_means_over_seeds_of_the_best_rate_against_the_llama():
    rows = [row(f"llama:muon:1e-3:{seed}", loss) for seed, loss in enumerate((2.0, 2.1))]
    rows += [row(f"retnet:muon:2e-3:{seed}", loss) for seed, loss in enumerate((1.9, 2.0))]
    rows += [row("retnet:muon:4e-3:0", 1.0)]  # one seed only: its luck does not choose the rate
    lines = quality_report.result_table(rows).splitlines()
    assert lines[2].startswith("| retnet | muon | 0.002 | 2 | 7.04 | 6.7 to 7.4 | -9.5% |")
    assert lines[3].startswith("| llama | muon | 0.001 | 2 | 7.78 | 7.4 to 8.2 |  |")


def test_runs_on_other_tokens_or_of_other_lengths_are_not_compared():
    rows = [row("llama:adamw:1e-3:0", 3.0), row("retnet:adamw:1e-3:0", 2.0, data="other")]
    rows += [row("gated:adamw:1e-3:0:9", 2.0), row("mamba2:adamw:1e-3:0", 2.0, shape="40m")]
    assert quality_report.tables(rows).count("###") == 4


def test_the_command_line_trains_collects_and_prints(tmp_path, monkeypatch, capsys):
    def call(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
        quality.main()
        return capsys.readouterr().out

    call("run", "retnet:adamw:3e-3:0", "--tiny", "--steps", 2, "--out", tmp_path / "rows")
    (tmp_path / "all.jsonl").write_text(call("collect", tmp_path / "rows"))
    assert json.loads((tmp_path / "all.jsonl").read_text())["status"] == "done"
    assert call("table", tmp_path / "all.jsonl") == call("table", tmp_path / "rows")


def test_a_picture_names_stacks_in_words():
    assert quality_report.label("llama") == "Llama-style"
    assert quality_report.label("gated-conv+sigmoid") == "gated, conv, sigmoid gate"
    assert set(quality_report.NAMES) <= set(BASES) == set(quality_report.RIVALS)
