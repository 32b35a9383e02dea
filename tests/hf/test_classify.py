"""Heads for texts and tokens: pooling, losses, directories opened by other classes, Trainer, PEFT, pipelines."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

import retnet.hf
from retnet.models.directory import load_model
from retnet.models.hf import RetNetConfig, RetNetForSequenceClassification, RetNetForTokenClassification
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import BYTES, hf_model, small_config, unit_gain_

from .conftest import random_ids

TEXTS = ["a", "decay", "the state of a head"]


def classifier(kind=RetNetForSequenceClassification, stack="hybrid", labels=3, **options):
    torch.manual_seed(0)
    model = kind(RetNetConfig.of(small_config(stack, **BYTES, **options), num_labels=labels)).eval()
    if "init" not in options:
        unit_gain_(model.model)
    return model


def batch(side: str) -> dict[str, torch.Tensor]:
    return byte_tokenizer()(TEXTS, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [RetNetForSequenceClassification, RetNetForTokenClassification])
def test_padding_on_either_side_changes_no_logits(kind, side):
    model, inputs = classifier(kind), batch(side)
    together = model(**inputs).logits
    for row, text in enumerate(TEXTS):
        alone = model(**byte_tokenizer()(text, return_tensors="pt")).logits[0]
        got = (
            together[row]
            if kind is RetNetForSequenceClassification
            else together[row][inputs["attention_mask"][row] == 1]
        )
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_a_text_is_read_at_its_last_real_token():
    model, inputs = classifier(), batch("right")
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    last = inputs["attention_mask"].sum(1) - 1
    torch.testing.assert_close(model(**inputs).logits, model.score(hidden[torch.arange(3), last]))
    holes = inputs["attention_mask"].clone()
    holes[2, 5:] = torch.tensor([0, 1, 0])[torch.arange(holes.shape[1] - 5) % 3]
    hidden = model(inputs["input_ids"], holes, output_hidden_states=True).hidden_states[-1]
    last = int(holes[2].nonzero()[-1])
    torch.testing.assert_close(model(inputs["input_ids"], holes).logits[2], model.score(hidden[2, last]))


def test_without_a_mask_the_last_token_that_is_no_pad_is_read():
    model, inputs = classifier(), batch("right")
    expected = model(**inputs).logits
    assert not torch.equal(model(inputs["input_ids"]).logits[0], expected[0]), "without a pad id, the last column"
    model.config.pad_token_id = 255
    torch.testing.assert_close(model(inputs["input_ids"]).logits, expected)
    only_pads = torch.full((2, 4), 255)
    assert model(only_pads).logits.shape == (2, 3)


@pytest.mark.parametrize("mark", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_texts_have_one_row_of_logits_each(mark):
    model, ids, lengths = classifier(), random_ids(1, 16), [5, 1, 10]
    marks = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, 5, 6, 16]),
        "seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None],
    }
    output = model(ids, **{mark: marks[mark]}, labels=torch.tensor([0, 2, 1]))
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(output.logits, alone, rtol=1e-4, atol=1e-5)
    assert output.loss.item() == pytest.approx(F.cross_entropy(alone, torch.tensor([0, 2, 1])).item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"labels have shape \[1\] for 3 texts"):
        model(ids, **{mark: marks[mark]}, labels=torch.tensor([0]))


def test_what_no_text_can_be_read_from_is_refused():
    model, ids = classifier(), random_ids(2, 4)
    with pytest.raises(ValueError, match=r"no real token in rows \[1\]"):
        model(ids, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="packed document is empty"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 4, 8]))
    with pytest.raises(ValueError, match="shift_labels given to"):
        model(ids, labels=torch.tensor([0, 1]), shift_labels=ids)
    with pytest.raises(TypeError, match="wraps no language model"):
        RetNetForSequenceClassification.wrap(hf_model().model)


def test_a_text_continues_from_a_cache():
    model, ids = classifier(), random_ids(2, 9)
    first = model(ids[:, :5])
    then = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
        ("regression", 2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 3.0]])),
        ("single_label_classification", 4, torch.tensor([0, 3, -100])),
        ("multi_label_classification", 2, torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])),
    ],
)
def test_the_loss_of_each_problem_and_its_share_of_an_accumulated_step(problem, num_labels, labels):
    model, inputs = classifier(labels=num_labels), batch("left")
    if problem == "regression" and num_labels > 1:  # labels alone would mean several classes
        model.config.problem_type = problem
    output = model(**inputs, labels=labels)
    assert model.config.problem_type == problem
    expected = {
        "regression": lambda x: F.mse_loss(x.view_as(labels), labels),
        "single_label_classification": lambda x: F.cross_entropy(x, labels),
        "multi_label_classification": lambda x: F.binary_cross_entropy_with_logits(x, labels),
    }[problem](output.logits)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    items = (labels != -100).sum()
    parts = [
        model(**{k: x[rows] for k, x in inputs.items()}, labels=labels[rows], num_items_in_batch=items).loss.item()
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert sum(parts) == pytest.approx(expected.item(), rel=1e-4), "two micro-batches are one batch"


def test_labels_of_tokens_that_are_all_ignored_have_no_loss():
    model, ids = classifier(RetNetForTokenClassification), random_ids(2, 5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0
    labels = random_ids(2, 5) % 3
    labels[0, :3] = -100
    output = model(ids, labels=labels)
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()).item())


def test_the_losses_of_routers_are_part_of_the_loss():
    model, ids, labels = classifier(stack="experts"), random_ids(2, 6), torch.tensor([0, 1])
    alone = model(ids, labels=labels).loss
    model.train()
    assert model(ids, labels=labels).loss.item() > alone.item()


@pytest.mark.parametrize("tied", [True, False])
def test_one_directory_opens_by_every_class_and_says_what_is_new(tmp_path, tied):
    model = hf_model("hybrid", tie_embeddings=tied)
    model.save_pretrained(tmp_path / "lm")
    ids = random_ids(2, 7)
    chosen, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "lm", id2label={0: "code", 1: "prose"}, label2id={"code": 0, "prose": 1}, output_loading_info=True
    )
    assert report["missing_keys"] == {"score.weight"}
    assert set(report["unexpected_keys"]) == (set() if tied else {"model.head.weight"})
    assert type(chosen) is RetNetForSequenceClassification
    assert "model.head.weight" not in chosen.state_dict()
    assert chosen.score.weight.std().item() == pytest.approx(chosen.config.initializer_range, rel=0.3)
    body = AutoModel.from_pretrained(tmp_path / "lm")
    expected = body(ids).last_hidden_state
    torch.testing.assert_close(chosen.score(expected[:, -1]), chosen(ids).logits)

    chosen.save_pretrained(tmp_path / "classifier")
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again(ids).logits, chosen(ids).logits)
    assert again.config.id2label == {0: "code", 1: "prose"}
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "classifier")(ids).last_hidden_state, expected)
    tokens = AutoModelForTokenClassification.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(tokens(ids).logits[:, -1], chosen(ids).logits)
    speaker, report = AutoModelForCausalLM.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert report["missing_keys"] == (set() if tied else {"model.head.weight"})
    if tied:
        assert torch.equal(speaker(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="holds a classifier; accepted: a language model"):
        load_model(tmp_path / "classifier")


def test_the_body_gives_hidden_states_of_every_layer_and_continues():
    body = retnet.hf.RetNetModel.wrap(hf_model("hybrid").model).eval()
    ids = random_ids(2, 8)
    whole = body(ids, output_hidden_states=True)
    assert len(whole.hidden_states) == len(body.model.layers) + 1
    assert torch.equal(whole.hidden_states[-1], whole.last_hidden_state)
    first = body(ids[:, :5], use_cache=True)
    then = body(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.last_hidden_state, whole.last_hidden_state[:, 5:], rtol=1e-4, atol=1e-5)
    assert then.past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_keeps_the_classes(tmp_path, tied):
    model, ids = classifier(tie_embeddings=tied), random_ids(2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(300)
    torch.testing.assert_close(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.model.embedding.num_embeddings == 300
    torch.testing.assert_close(again(ids).logits, before)


def test_recomputed_layers_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = classifier().train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(random_ids(2, 6), labels=torch.tensor([0, 2])).loss.backward()
        assert all(p.grad is not None for p in model.parameters()), "no parameter is without use"
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def lines_of_code_and_prose() -> list[dict]:
    """Lines of a module of the standard library: 1 for its docstrings and comments, 0 for its code."""
    source = inspect.getsource(textwrap) + inspect.getsource(inspect) + inspect.getsource(ast)
    tree = ast.parse(source)
    docs = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    prose = {line.strip() for text in docs for line in text.splitlines()}
    code = {line.strip() for line in source.splitlines() if "#" not in line and '"""' not in line} - prose
    kept = [sorted(line[:40] for line in lines if len(line) > 20) for lines in (code, prose)]
    count = min(map(len, kept))
    return [
        {**byte_tokenizer()(line), "labels": label}
        for i in range(count)
        for label, line in enumerate(x[i] for x in kept)
    ]


def arguments(output, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=16, learning_rate=5e-3, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", seed=0, **options
    )  # fmt: skip


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.slow
def test_trainer_learns_to_tell_prose_from_code(tmp_path):
    rows = lines_of_code_and_prose()
    held_out, train = rows[::5], [row for i, row in enumerate(rows) if i % 5]
    trainer = Trainer(
        classifier(stack="both decays", labels=2, init="paper").train(),
        arguments(tmp_path, max_steps=150),
        DataCollatorWithPadding(byte_tokenizer()),
        train,
        held_out,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert before < 0.7
    assert trainer.evaluate()["eval_accuracy"] > 0.85


@pytest.mark.slow
def test_trainer_learns_a_label_for_every_token(tmp_path):
    """Whether a space came before it in the line: no byte says so itself."""
    rows = []
    for row in lines_of_code_and_prose()[:300]:
        ids = row["input_ids"]
        rows.append({**row, "labels": [-100, *(int(32 in ids[:i]) for i in range(1, len(ids)))]})
    trainer = Trainer(
        classifier(RetNetForTokenClassification, "both decays", labels=2, init="paper").train(),
        arguments(tmp_path, max_steps=100),
        DataCollatorForTokenClassification(byte_tokenizer()),
        rows[30:],
        rows[:30],
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1


def test_accumulated_batches_train_as_one(tmp_path):
    """A regression, which transformers' own loss does not divide by the steps of an accumulation."""
    rows = [{**byte_tokenizer()(text), "labels": float(len(text))} for text in (*TEXTS, "of")]
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        model = classifier(stack="both decays", labels=1).train()
        options = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=1e9)
        options.per_device_train_batch_size = size
        Trainer(model, options, DataCollatorWithPadding(byte_tokenizer()), rows).train()
        weights.append(model.score.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS"])
def test_an_adapter_saves_the_head_that_it_trains(tmp_path, kind):
    peft = pytest.importorskip("peft")
    auto = AutoModelForSequenceClassification if kind == "SEQ_CLS" else AutoModelForTokenClassification
    hf_model().save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", num_labels=3)
    # PEFT leaves the head out of "all-linear" for texts alone.
    config = peft.LoraConfig(task_type=kind, r=4, target_modules="all-linear", exclude_modules=["score"])
    adapted = peft.get_peft_model(model, config)
    assert any("score.modules_to_save" in n for n, p in adapted.named_parameters() if p.requires_grad)
    ids = random_ids(3, 6)
    labels = torch.tensor([0, 1, 2]) if kind == "SEQ_CLS" else ids % 3
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    fresh = auto.from_pretrained(tmp_path / "base", num_labels=3)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        auto.from_pretrained(tmp_path / "merged")(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_pipelines_read_a_directory(tmp_path, task, caplog):
    kind = RetNetForSequenceClassification if task == "text-classification" else RetNetForTokenClassification
    model = classifier(kind, labels=2)
    model.config.id2label, model.config.label2id = {0: "code", 1: "prose"}, {"code": 0, "prose": 1}
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = pipeline(task, model=str(tmp_path), device="cpu")
    alone, together = [run(text) for text in TEXTS], run(TEXTS, batch_size=3)
    assert "is not supported" not in caplog.text
    if task == "text-classification":
        probabilities = model(**batch("left")).logits.softmax(-1)
        for row, (one,), other in zip(probabilities, alone, together, strict=True):
            assert one["label"] == other["label"] == ["code", "prose"][int(row.argmax())]
            assert one["score"] == pytest.approx(other["score"], rel=1e-4)
            assert one["score"] == pytest.approx(row.max().item(), rel=1e-4)
    else:
        assert [[t["entity"] for t in text] for text in alone] == [[t["entity"] for t in text] for text in together]
        assert len(alone[1]) == len("decay")


def test_a_half_precision_classifier_comes_back_in_it(tmp_path):
    classifier().bfloat16().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.score.weight.dtype == torch.bfloat16
    assert model(random_ids(2, 5), labels=torch.tensor([0, 1])).loss.isfinite()


def test_tokenizers_and_other_processes_find_the_classes(tmp_path):
    from retnet.models.directory import AUTO_MAP, SHIM

    classes = {name.partition(".")[2] for name in AUTO_MAP.values()}
    assert classes <= set(retnet.hf.__all__)
    assert re.search(r"^from retnet\.hf import \*", SHIM, re.M)
    byte_tokenizer().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id == 255
