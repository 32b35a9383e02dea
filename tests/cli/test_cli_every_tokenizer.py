"""Every verb that reads or writes text, with every kind of tokenizer: bytes, one trained for a recipe, a converted one.

Each cell of the table runs the command line and looks at the text; `-s` prints the table.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import retnet
from retnet.cli import main
from retnet.models.directory import save_model
from tests.small_models import small_model

KINDS = ("bytes", "BPE of a recipe", "converted Llama")
TABLE: dict[tuple[str, str], str] = {}
SPECIAL = "<|end|>"


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    assert not done.value.code


@pytest.fixture(scope="module", autouse=True)
def _table():
    """Prints the cells that ran, verb by verb; pytest -s shows them."""
    yield
    for verb in dict.fromkeys(verb for verb, _ in TABLE):
        print(f"\n{verb:16}", *(f"{TABLE.get((verb, kind), '-'):32}" for kind in KINDS), sep="| ", end="")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = random.Random(0)
    words = ["state", "decay", "naïve", "φύσις", "状态", "😀", "token"]
    folder = tmp_path_factory.mktemp("texts") / "texts"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=60)))
    return folder


def train_tokenizer(texts: Path, kind: str, path: Path) -> None:
    """Byte-level BPE like GPT-2's, or BPE over Metaspace words with byte fallback like Llama's."""
    special = [SPECIAL] if kind == "BPE of a recipe" else ["<unk>", "<s>", "</s>"]
    if kind == "BPE of a recipe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        special, alphabet = special + [f"<0x{b:02X}>" for b in range(256)], list("▁<>|/")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([file.read_text() for file in texts.iterdir()], trainer)
    if kind != "BPE of a recipe":  # the byte tokens are ordinary ones
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.save(str(path))


def converted_llama(texts: Path, folder: Path) -> Path:
    """A transformers directory with its tokenizer, through `retnet convert`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "theirs")
    train_tokenizer(texts, "converted Llama", folder / "theirs/tokenizer.json")
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "theirs/tokenizer_config.json").write_text(json.dumps(special))
    run("convert", folder / "theirs", folder / "converted")
    return folder / "converted"


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def data(kind, texts, tmp_path_factory) -> Path:
    """The training data of the model: text for bytes, otherwise token shards."""
    if kind == "bytes":
        return texts
    folder = tmp_path_factory.mktemp("data")
    train_tokenizer(texts, kind, folder / "tokenizer.json")
    words = [] if kind == "BPE of a recipe" else ["--document-start", "<s>"]
    run("data", texts, folder / "tokens", "--tokenizer", folder / "tokenizer.json", *words, "--workers", 1)
    return folder / "tokens"


@pytest.fixture(scope="module")
def model(kind, texts, data, tmp_path_factory) -> Path:
    """The directory that a user has: from a recipe for bytes and BPE, from `retnet convert` for the Llama."""
    folder = tmp_path_factory.mktemp("model")
    if kind == "converted Llama":
        return converted_llama(texts, folder)
    vocabulary = {"vocab_size": 257, "bos_token_id": 256} if kind == "bytes" else {"vocab_size": 320}
    save_model(small_model(**vocabulary, init="paper"), folder / "start")
    train(folder / "start", data, folder / "trained")
    return folder / "trained"


def train(start: Path, data: Path, output: Path) -> None:
    recipe = output.with_suffix(".yaml")
    recipe.write_text(
        "length: 32\nmax_steps: 2\nper_device_train_batch_size: 2\nsave_strategy: no\nnum_samples: 2\n"
        "valid_fraction: 0.2\ndo_eval: false\n"
    )
    run("train", recipe, f"output_dir={output}", "--data", data, "--model", start)


@pytest.fixture
def cell(kind, capsys) -> Callable[[str, object], None]:
    def record(verb: str, figure: object) -> None:
        TABLE[verb, kind] = str(figure)

    return record


def test_generate_prints_the_text_of_the_tokens(capsys, model, cell):
    prompt = f"state 状态 {SPECIAL} <s>"
    capsys.readouterr()
    run("generate", model, prompt, "--max-tokens", 40, "--seed", 1, "--no-stats")
    printed = capsys.readouterr().out
    tokens = generated_tokens(model, prompt, 40, 1)
    assert printed == retnet.load_tokenizer(model).decode(tokens) + "\n"
    assert printed.strip()
    cell("generate", f"{len(tokens)} tokens, {len(printed) - 1} characters")


def generated_tokens(directory: Path, prompt: str, count: int, seed: int) -> list[int]:
    """Tokens from the engine, without `retnet.generate`."""
    model, tokenizer = retnet.load(directory, "cpu"), retnet.load_tokenizer(directory)
    ids = tokenizer.encode(prompt, start=True)
    engine = retnet.Engine(model, num_slots=1, max_tokens=len(ids) + count, prompt_chunk=2048)
    return list(engine.stream(retnet.Request(ids, count, retnet.Sampling(temperature=0.8, seed=seed))))


def test_check_runs_on_the_tokens_of_a_text(capsys, model, texts, cell):
    capsys.readouterr()
    run("check", model, "--text", texts / "00.txt", "--dtype", "float32", "--json")
    rows = json.loads(capsys.readouterr().out)
    expected = 1 + len(retnet.load_tokenizer(model).encode((texts / "00.txt").read_text()))
    assert {row["tokens"] for row in rows} == {min(512, expected)}
    assert all(row["passed"] for row in rows)
    cell("check --text", f"{len(rows)} rows agree, {rows[0]['tokens']} tokens")


@torch.no_grad()
def nats_of(model: Path, text: str) -> float:
    ids = torch.tensor([retnet.load_tokenizer(model).encode(text, start=True)])
    logits = retnet.load(model, "cpu", "float64")(ids[:, :-1]).logits[0]
    return -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum().item()


def test_eval_data_gives_bits_per_byte_beside_compressors(capsys, model, texts, data, cell):
    capsys.readouterr()
    run("eval", model, "--data", texts, "--part", "all", "--json")
    report = json.loads(capsys.readouterr().out)
    expected = [file.read_text() for file in sorted(texts.iterdir())]
    num_bytes = sum(len(text.encode()) for text in expected)
    bits = sum(nats_of(model, text) for text in expected) / torch.log(torch.tensor(2.0)).item()
    assert report["bytes"] == num_bytes
    assert report["bits_per_byte"][str(model)] == pytest.approx(bits / num_bytes, rel=1e-4)
    assert {"gzip -9", "xz -9"} < report["bits_per_byte"].keys()
    cell("eval --data", f"{bits / num_bytes:.2f} bits per byte")
    run("eval", model, "--data", texts / "00.txt", "--json")  # the end of a file, cut anywhere
    run("eval", model, "--data", data, "--valid-fraction", 0.2, "--json")
    assert "order-2 bytes" in capsys.readouterr().out


def test_eval_refuses_tokens_of_another_tokenizer(capsys, model, kind, texts, tmp_path):
    train_tokenizer(texts, "BPE of a recipe" if kind != "BPE of a recipe" else "converted Llama", tmp_path / "t.json")
    words = ["--tokenizer", tmp_path / "t.json", "--document-start", "<s>" if kind == "BPE of a recipe" else SPECIAL]
    run("data", texts, tmp_path / "tokens", *words, "--workers", 1)
    with pytest.raises(SystemExit) as done:
        main(["eval", str(model), "--data", str(tmp_path / "tokens")])
    assert done.value.code == 2
    assert "holds tokens of another tokenizer than that of" in " ".join(capsys.readouterr().err.split())


def test_eval_file_gives_perplexity(capsys, model, texts, cell):
    capsys.readouterr()
    run("eval", model, "--file", texts / "00.txt", "--json")
    report = json.loads(capsys.readouterr().out)["stateful"]
    text = (texts / "00.txt").read_text()
    assert report["nats"] == pytest.approx(nats_of(model, text), rel=1e-4)
    cell("eval --file", f"perplexity {report['perplexity_per_token']:.0f} per token")


def test_training_writes_samples_that_begin_with_validation_text(model, kind, texts, data, tmp_path, cell):
    """From the model's own directory: its tokenizer is checked against the data's, and saved again."""
    train(model, data, tmp_path / "out")
    samples = (tmp_path / "out/samples.txt").read_text()
    beginnings = {file.read_text()[:10] for file in texts.iterdir()}
    assert sum(beginning in samples for beginning in beginnings) >= 2
    assert retnet.load_tokenizer(tmp_path / "out").same_tokens(retnet.load_tokenizer(model))
    assert retnet.load_tokenizer(tmp_path / "out").document_start == retnet.load_tokenizer(model).document_start
    cell("train's samples", f"{samples.count('>>>')} samples")


def test_conversion_carries_the_tokenizer_along(capsys, model, tmp_path, cell):
    run("convert", model, tmp_path / "copy")
    ours, copied = retnet.load_tokenizer(model), retnet.load_tokenizer(tmp_path / "copy")
    assert copied.identity == ours.identity
    assert copied.encode("state 状态", start=True) == ours.encode("state 状态", start=True)
    outputs = []
    for directory in (model, tmp_path / "copy"):
        capsys.readouterr()
        run("generate", directory, "state", "--max-tokens", 8, "--temperature", 0, "--no-stats")
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    cell("convert", "the same text before and after")
