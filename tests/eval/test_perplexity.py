"""Perplexity: one state for a whole text, windows beside it, and words as WikiText counts them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from retnet.api import load_tokenizer
from retnet.cli import main
from retnet.data import Tokenizer
from retnet.eval.perplexity import Perplexity, count_words, perplexity
from retnet.models.directory import load_model
from retnet.models.hf.tokenizer import byte_tokenizer
from retnet.models.lm import LanguageModel
from retnet.models.presets import retnet_config
from retnet.stack.resolve import tokenizer_of
from tests.paths import SHARED
from tests.small_models import PAPER, small_model

TEXT = " the state decays \n\n a token is read and the state goes on \n" * 3


@pytest.fixture
def model(byte_model) -> LanguageModel:
    return load_model(byte_model)


@pytest.fixture
def tokenizer(model) -> Tokenizer:
    return load_tokenizer(model)


def nats_of(model, ids, begin, end, first):
    """Nats of tokens first + 1 .. end of ids, read from `begin`."""
    with torch.no_grad():
        logits = model(ids[:, begin:end]).logits[0, first - begin :]
    return F.cross_entropy(logits, ids[0, first + 1 : end + 1], reduction="sum").item()


def test_the_whole_text_is_one_context(model, tokenizer):
    ids = torch.tensor([[256, *TEXT.encode()]])
    result = perplexity(model, tokenizer, TEXT)
    assert result.nats == pytest.approx(nats_of(model, ids, 0, len(TEXT), 0), rel=1e-5)
    assert (result.num_tokens, result.num_bytes) == (len(TEXT), len(TEXT))
    assert result.per_token == pytest.approx(math.exp(result.nats / len(TEXT)))
    assert result.bits_per_byte == pytest.approx(math.log2(result.per_token))


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (50, 7), (1000, 10), (1, 1)])
def test_windows_score_every_token_once_with_enough_before_it(model, tokenizer, context, stride):
    ids = torch.tensor([[256, *TEXT.encode()]])
    expected, first = 0.0, 0
    while first < len(TEXT):
        end = min(len(TEXT), context if first == 0 else first + stride)
        expected += nats_of(model, ids, max(0, end - context), end, first)
        first = end
    result = perplexity(model, tokenizer, TEXT, context=context, stride=stride)
    assert result.nats == pytest.approx(expected, rel=1e-4)
    if context > len(TEXT):
        assert result.nats == pytest.approx(perplexity(model, tokenizer, TEXT).nats, rel=1e-5)


def test_words_are_counted_with_one_end_per_line():
    assert count_words(" a b \n\n = c = \n") == 2 + 1 + 0 + 1 + 3 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 8, "stride": 9}, "1 <= stride <= context"), ({"stride": 9}, "stride is 9 without a context")],
)
def test_windows_that_leave_tokens_out_are_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokenizer, TEXT, **options)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared beside the repository")
def test_wikitext_is_counted_by_its_own_words_whatever_the_tokenizer(model, tokenizer, tmp_path):
    """The published count of the test split; and word perplexity is all nats over words, whatever the tokens."""
    wikitext = (SHARED / "data" / "wikitext-2" / "test.txt").read_text()
    assert count_words(wikitext) == 245_569
    text = "\n".join(wikitext.splitlines()[:12]) + "\n"
    (tmp_path / "tokenizer.json").write_bytes((SHARED / "data" / "gpt2-tokenizer" / "tokenizer.json").read_bytes())
    uniform = small_model([PAPER], vocab_size=50257, bos_token_id=50256)
    with torch.no_grad():
        uniform.head.weight.zero_()
    result = perplexity(uniform, tokenizer_of(uniform.config, tmp_path), text)
    assert result.num_words == perplexity(model, tokenizer, text).num_words < result.num_tokens < len(text)
    assert math.log(result.per_word) == pytest.approx(math.log(50257) * result.num_tokens / result.num_words)


def test_the_command_reports_both_ways_to_read(byte_model, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    with pytest.raises(SystemExit):
        main(["eval", str(byte_model), "--file", str(file), "--context", "32", "--stride", "16", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"stateful", "strided"}
    assert report["stateful"]["tokens"] == len(TEXT)
    assert report["strided"]["nats"] != report["stateful"]["nats"]


def test_a_directory_with_a_shim_is_read_without_executing_it(byte_model, tmp_path):
    """In a fresh process, where transformers does not know the model and would ask whether to run the shim."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert "auto_map" in json.loads((byte_model / "config.json").read_text())
    directory = shutil.copytree(byte_model, tmp_path / "model")
    byte_tokenizer().save_pretrained(directory)
    command = [sys.executable, "-m", "retnet.cli", "eval", str(directory), "--file", str(file), "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    assert json.loads(done.stdout)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of 61 and no tokenizer\.json beside its weights"):
        tokenizer_of(retnet_config("other", 1, 32, 2, vocab_size=61), tmp_path)


def test_a_long_text_without_words_has_an_infinite_perplexity_per_word():
    result = Perplexity(nats=50_000.0, num_tokens=9000, num_words=6, num_bytes=9000)
    assert result.per_word == math.inf
    assert result.per_token == pytest.approx(math.exp(50_000 / 9000))
