"""`retnet.load`, `retnet.load_tokenizer` and `retnet.generate`: every model in three lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import retnet
from retnet import api
from retnet.data.tokenizer import ByteTokenizer
from retnet.data.tokenizer_json import JsonTokenizer
from retnet.models.convert import convert
from retnet.models.decode.sampling import Sampling
from retnet.models.directory import save_model
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import ALIBI, BYTES, hf_model, small_model
from tests.stack.specs import changed


def save_words(directory, **options):
    """A saved model of three words, with its tokenizer."""
    save_model(small_model(vocab_size=6, **options), directory)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "\ufffd": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "[UNK]"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_words(tmp_path_factory.mktemp("models") / "words")


@pytest.fixture
def named(request, byte_model, directory, tmp_path):
    """The name or path that a user gives for each kind of model."""
    if request.param == "converted":
        convert(directory, tmp_path / "converted")
        return tmp_path / "converted"
    if request.param == "stack file":
        (tmp_path / "stack.yml").write_text(changed(("vocab_size: 257", "vocab_size: 260")))
        return str(tmp_path / "stack.yml")
    return {"saved bytes": byte_model, "saved words": directory}.get(request.param, request.param)


@pytest.mark.parametrize(
    "named",
    ["retnet-tiny", "arch_advanced_retnet_mini", "stack file", "saved bytes", "saved words", "converted"],
    indirect=True,
)
def test_three_lines_are_enough_for_any_model(named):
    model = retnet.load(named, device="cpu")
    text = retnet.generate(model, "a b", max_tokens=5, temperature=0)
    assert text == retnet.generate(named, "a b", max_tokens=5, temperature=0)
    assert retnet.load_tokenizer(model).identity == retnet.load_tokenizer(named).identity
    assert text == "".join(retnet.generate(model, b"a b", max_tokens=5, temperature=0, stream=True))
    ids = retnet.load_tokenizer(model).encode("a b", start=True)
    for tokens in (ids, torch.tensor(ids)):
        assert retnet.generate(model, tokens, max_tokens=5, temperature=0) == text


def test_a_loaded_model_remembers_where_its_tokenizer_is(directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    model = retnet.load("words", device="cpu")
    assert model.directory is not None
    assert isinstance(retnet.load_tokenizer(model), JsonTokenizer)
    assert small_model(**BYTES).directory is None
    assert isinstance(retnet.load_tokenizer(small_model(**BYTES)), ByteTokenizer)


def test_a_preset_does_not_take_the_tokenizer_of_a_directory_with_its_name(directory, monkeypatch, tmp_path):
    save_words(tmp_path / "retnet-tiny")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"'retnet-tiny' is the preset, .*; that one is \./retnet-tiny"):
        assert isinstance(retnet.load_tokenizer("retnet-tiny"), ByteTokenizer)


@pytest.mark.parametrize("given", [Path("retnet-tiny"), "./retnet-tiny"])
def test_a_path_is_never_a_preset(given, monkeypatch, tmp_path):
    save_words(tmp_path / "retnet-tiny")
    monkeypatch.chdir(tmp_path)
    assert isinstance(retnet.load_tokenizer(given), JsonTokenizer)
    assert retnet.load(given, "cpu").config.vocab_size == 6


def test_the_tokenizers_end_of_text_token_ends_the_text(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "with end")
    (tmp_path / "with end/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "b"}')
    options = {"prompt": "a", "max_tokens": 40, "seed": 3, "temperature": 2.0}
    text = retnet.generate(directory, **options)
    assert "b" in text[1:]
    assert retnet.generate(tmp_path / "with end", **options).strip() == text[: text.index("b")].strip()


def test_a_tokenizer_is_named_by_text_or_by_a_path(byte_model, directory):
    model = small_model(vocab_size=6)
    texts = {retnet.generate(model, "a b", tokenizer=given(directory), temperature=0) for given in (str, Path)}
    assert len(texts) == 1


@pytest.mark.parametrize("wrong", [5, None, b"retnet-tiny", "transformers"])
def test_a_value_that_is_not_a_model_is_refused_with_what_is_accepted(wrong):
    model = hf_model() if wrong == "transformers" else wrong
    message = rf"model is of type {type(model).__name__}; accepted: a preset's name, .* LanguageModel .*: its `model`"
    for call in (retnet.load, retnet.load_tokenizer, retnet.generate):
        with pytest.raises(ValueError, match=message):
            call(model)
    if wrong == "transformers":
        assert retnet.generate(model.model, "x", max_tokens=4)


def test_a_model_without_a_tokenizer_needs_one_by_name(directory):
    model = small_model(vocab_size=6)
    with pytest.raises(ValueError, match=r"vocabulary of 6; accepted without a tokenizer: bytes, 257 tokens \(or name"):
        retnet.generate(model, "a b")
    by_name = retnet.generate(model, "a b", tokenizer=str(directory), max_tokens=8, temperature=0)
    given = retnet.generate(model, "a b", tokenizer=retnet.load_tokenizer(directory), max_tokens=8, temperature=0)
    assert by_name == given == retnet.generate(directory, "a b", max_tokens=8, temperature=0)


def test_weights_are_loaded_in_the_dtype_asked_for(byte_model):
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert retnet.load(byte_model, "cpu", dtype).embedding.weight.dtype == torch.bfloat16
    assert retnet.load(byte_model, "cpu").embedding.weight.dtype == torch.float32
    for wrong in ("int8", torch.int8, "half"):
        with pytest.raises(ValueError, match=r"dtype is .*; accepted: float64, float32, float16, bfloat16"):
            retnet.load(byte_model, "cpu", wrong)


def test_automatic_is_the_gpu_if_there_is_one(monkeypatch):
    from retnet.ops.device import resolve_device

    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: 2 * there)
        assert resolve_device("auto").type == expected
    with pytest.raises(ValueError, match="device is 'cuda' and there is no CUDA device here; accepted: cpu, auto"):
        resolve_device("cuda")
    for unknown in ("gpu", None, -1):
        with pytest.raises(ValueError, match=f"device is {unknown!r}; accepted: auto, cpu, cuda"):
            resolve_device(unknown)
    for absent in ("meta", "xla"):
        with pytest.raises(ValueError, match=f"device is '{absent}', which has no kernels here; accepted: auto"):
            resolve_device(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device is 'cuda:2'; accepted: auto, cpu, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_the_whole_text_ends_before_a_stop_string_and_so_do_its_pieces(byte_model):
    model = retnet.load(byte_model, "cpu")
    text = retnet.generate(model, "x", max_tokens=60, seed=4)
    stop = text[20:23]
    expected = text[: text.index(stop)]
    assert retnet.generate(model, "x", max_tokens=60, seed=4, stop=stop) == expected
    pieces = list(retnet.generate(model, "x", max_tokens=60, seed=4, stop=[stop, "never"], stream=True))
    assert "".join(pieces) == expected
    assert all(pieces)


def test_options_reach_the_engine(byte_model, monkeypatch):
    seen = []

    class Spy(Engine):
        def __init__(self, *args, **kwargs):
            self.options = kwargs
            super().__init__(*args, **kwargs)

        def stream(self, request, after=None):
            seen.append((request, self.options))
            return super().stream(request, after)

    monkeypatch.setattr(api, "Engine", Spy)
    sampling = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4, "seed": 11,
    }  # fmt: skip
    retnet.generate(byte_model, "x", max_tokens=6, stop="zzz", speculate=3, **sampling)
    ((request, options),) = seen
    assert request.sampling == retnet.Sampling(**sampling)
    assert (request.max_new_tokens, list(request.stop_strings), list(request.prompt)) == (6, ["zzz"], [256, 120])
    assert options["speculation"].draft_tokens == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": None}, "max_tokens is None without stream"),
        ({"max_tokens": 0}, "max_tokens is 0; accepted: 1 or more, or None with stream"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; accepted"),
        ({"max_tokens": True}, "max_tokens is True; accepted"),
        ({"temperature": -1}, "temperature is -1"),
        ({"speculate": 2}, "draft_tokens is 2"),
        ({"speculate": "3"}, "draft_tokens is '3'; accepted"),
        ({"stop": b"x"}, "stop_strings is a sequence with 120 in it; accepted: a sequence of strings"),
        ({"prompt": None}, r"prompt is None; accepted: text, or token ids \[T\]"),
        ({"prompt": "\ud800"}, "the text has half of a surrogate pair at character 0; accepted"),
        ({"tokenizer": 5}, "tokenizer is of type int; accepted: a retnet Tokenizer, bytes"),
        ({"stop": [""]}, "stop_strings is a sequence with '' in it"),
        ({"prompt": torch.zeros(2)}, r"prompt is torch.float32 \[2\]; accepted: text, or token ids"),
        ({"prompt": [400]}, "token 400 is not in the vocabulary"),
        ({"tokenizer": "gone.json"}, "no such tokenizer"),
    ],
)
def test_invalid_options_of_generate_are_refused_at_once(byte_model, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        retnet.generate(byte_model, **({"prompt": "x", "max_tokens": 3} | options))


def test_an_endless_text_needs_a_state_that_does_not_grow(byte_model):
    with pytest.raises(ValueError, match=r"the text has no limit and layer 0 is attention without a window"):
        retnet.generate(small_model([ALIBI], **BYTES), "x", max_tokens=None, stream=True)
    pieces = retnet.generate(byte_model, "x", max_tokens=None, stream=True)
    assert [next(pieces) for _ in range(50)]


def test_a_start_token_of_256_alone_does_not_make_a_vocabulary_bytes():
    with pytest.raises(ValueError, match="vocabulary of 300; accepted without a tokenizer: bytes"):
        retnet.load_tokenizer(small_model(vocab_size=300, bos_token_id=256))


def test_an_unfinished_character_at_the_end_of_the_text_is_shown():
    assert "".join(api.stream_text(iter("a\u20ac".encode()[:-1]), ByteTokenizer())) == "a\ufffd"


def test_a_text_keeps_the_space_between_it_and_the_prompt(tmp_path):
    """Llama's decoder drops the space at the start of a text, and this one has none before it in the vocabulary."""
    loaded = Tokenizer(models.BPE({"<s>": 0, "\u2581a": 1, "b": 2}, []))
    loaded.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    loaded.add_special_tokens(["<s>"])
    loaded.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", 0)
    assert "".join(api.stream_text(iter([1, 2, 1]), tokenizer, after=[0, 2])) == " ab a"
    assert "".join(api.stream_text(iter([1, 2, 1]), tokenizer, after=[0])) == "ab a"
    model = small_model(vocab_size=3)
    told = [retnet.generate(model, [0, *rest], max_tokens=6, seed=5, tokenizer=tokenizer) for rest in ([], [2])]
    tokens = [
        list(Engine(model, num_slots=1).stream(Request([0, *rest], 6, Sampling(0.8, seed=5)))) for rest in ([], [2])
    ]
    assert told == [tokenizer.decode(tokens[0]), tokenizer.decode([2, *tokens[1]]).removeprefix("b")]
    assert tokens[1][0] == 1
