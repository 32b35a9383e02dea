import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retnet.data import tokenizer_json
from retnet.data.shards import token_dtype
from retnet.data.tokenizer import ByteTokenizer
from retnet.data.tokenizer_json import JsonTokenizer, find_tokenizer, saved_tokenizer, tokenizer_of_model
from retnet.models.hf.tokenizer import byte_tokenizer


@pytest.fixture(scope="session")
def trained(tokenizer_file):
    return find_tokenizer(str(tokenizer_file))


@settings(max_examples=40)
@given(st.lists(st.text(), max_size=4))
def test_any_text_survives_a_round_trip_at_its_full_length(trained, texts):
    texts = [text.encode(errors="replace") for text in texts]
    for text, tokens in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(tokens).encode() == text
        assert list(tokens) == trained.encode(text)
    assert token_dtype(trained.vocab_size) == np.uint16


def test_special_tokens_spelled_in_a_text_are_text(trained):
    tokens = trained.encode("a <|endoftext|> b")
    assert trained.document_start not in tokens
    assert trained.decode(tokens) == "a <|endoftext|> b"


def test_special_tokens_are_named_by_their_spelling(trained, tokenizer_file):
    assert trained.special_tokens == {"<|endoftext|>": trained.document_start}
    word = JsonTokenizer(tokenizer_file, 0, 300)  # an end that is no special token of the file
    assert word.special_tokens == {"<|endoftext|>": 0, trained._tokenizer.id_to_token(300): 300}


def test_starts_and_ends_are_dropped_when_decoding(tokenizer_file):
    trained = find_tokenizer(str(tokenizer_file), with_end=True)
    tokens = trained.encode(b"naive")
    assert trained.document_end == trained.document_start == 0
    assert trained.decode([0, *tokens, 0]) == "naive"


def test_the_document_start_comes_from_the_tokenizers_config(tokenizer_file, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    number = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"special tokens: <\|endoftext\|>, <s> \(choose one with --document-start\)"):
        find_tokenizer(str(tmp_path))
    assert find_tokenizer(str(tmp_path), "<s>").document_start == number
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    trained = find_tokenizer(str(tmp_path), with_end=True)
    assert (trained.document_start, trained.document_end, trained.vocab_size) == (number, 0, number + 1)


def test_transformers_loads_the_tokenizer_saved_beside_the_tokens(trained, tmp_path, articles):
    from transformers import AutoTokenizer

    trained.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.bos_token_id == loaded.eos_token_id == trained.document_start
    tokens = trained.encode(articles[0])
    assert loaded(articles[0], add_special_tokens=False, truncation=False).input_ids == tokens


def test_a_saved_tokenizer_is_the_same_and_another_file_in_its_place_is_refused(trained, tmp_path, tokenizer_file):
    trained.save(tmp_path / "saved")
    again = saved_tokenizer(tmp_path / "saved", trained.describe())
    assert again.encode("state decay") == trained.encode("state decay")
    assert again.describe() == trained.describe()
    shutil.copyfile(tokenizer_file, tmp_path / "saved/tokenizer.json")
    with open(tmp_path / "saved/tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="not the tokenizer of these tokens"):
        saved_tokenizer(tmp_path / "saved", trained.describe())


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path, tokenizer_file):
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: .*gone\.json .*accepted: bytes"):
        find_tokenizer(str(tmp_path / "gone.json"))
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: .*tokenizer\.json"):
        find_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"no special token '<s>'; it has: <\|endoftext\|>"):
        find_tokenizer(str(tokenizer_file), "<s>")
    with pytest.raises(ValueError, match="bytes have one document start"):
        find_tokenizer("bytes", with_end=True)
    for text in ("{}", "not json"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
            find_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "is a JSON list; accepted: an object"),
        ('{"bos_token": {"x": 1}}', r"""bos_token is \{"x": 1\}; accepted: text, null, or an object with 'content'"""),
        ('{"eos_token": ["<s>"]}', r'eos_token is \["<s>"\]; accepted'),
        ('{"bos_token": {"content": 3}}', "bos_token is .*; accepted"),
        ("{cut", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_tokenizer_config_that_cannot_be_used_is_named(tmp_path, tokenizer_file, config, message):
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json.*{message}"):
        find_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_is_flushed_to_the_disk(trained, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(tokenizer_json, "flush", flushed.append)
    trained.save(tmp_path / "saved")
    assert sorted(flushed[:-1]) == sorted((tmp_path / "saved").iterdir())
    assert flushed[-1] == tmp_path / "saved"


def test_a_tokenizer_of_the_hub_is_fetched_and_one_that_is_not_there_is_named(tokenizer_file, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("404")
        return str(tokenizer_file.parent if name == "org/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_tokenizer("org/model").identity == find_tokenizer(str(tokenizer_file)).identity
    templates = ["chat_template.jinja", "additional_chat_templates/*.jinja"]
    assert asked == [("org/model", ["tokenizer.json", "tokenizer_config.json", *templates])]
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: org/gone .*: 404"):
        find_tokenizer("org/gone")
    with pytest.raises(FileNotFoundError, match=r"org/without on the hub has no tokenizer\.json"):
        find_tokenizer("org/without")


def test_text_that_is_not_utf8_is_refused_with_the_place(trained):
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 3 \(0xff\); accepted by this tokenizer: UTF-8"):
        trained.encode(b"abc\xff")


def test_padding_of_the_vocabulary_decodes_to_nothing_and_negative_tokens_are_refused(trained):
    assert trained.decode([*trained.encode("state"), trained.vocab_size + 5]) == "state"
    with pytest.raises(ValueError, match="a token is -1; accepted: 0 or more"):
        trained.decode([-1])


def test_the_byte_tokenizer_of_transformers_is_recognised_as_bytes(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert isinstance(tokenizer_of_model("m", tmp_path, 257), ByteTokenizer)
    assert isinstance(tokenizer_of_model("m", tmp_path, 320), ByteTokenizer)  # a padded vocabulary
    plain = find_tokenizer(str(tmp_path))
    assert isinstance(plain, JsonTokenizer)
    text = "h\u00e9llo <|document|> \ufffd \U0001f600\n"
    assert plain.encode(text, start=True) == ByteTokenizer().encode(text, start=True)
    assert plain.decode(plain.encode(text)) == text
    assert plain.document_start == 256


@pytest.mark.parametrize("bos", [None, "<s>", {"content": "<s>"}])
def test_the_tokenizer_of_a_model_lies_beside_its_weights(tmp_path, tokenizer_file, bos):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    number = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    with_model = tokenizer_of_model("m", tmp_path, 512, bos=0, eos=0)
    assert with_model.document_start == (0 if bos is None else number)
    assert with_model.same_tokens(find_tokenizer(str(tmp_path), "<s>"))
    assert not with_model.same_tokens(find_tokenizer(str(tokenizer_file)))
    assert not with_model.same_tokens(ByteTokenizer())
    if bos is None:
        with pytest.raises(ValueError, match="neither a bos nor an eos token"):
            tokenizer_of_model("m", tmp_path, 512)


def test_a_model_without_its_tokenizer_says_what_is_accepted(tmp_path, tokenizer_file):
    assert isinstance(tokenizer_of_model("m", None, 257), ByteTokenizer)
    assert isinstance(tokenizer_of_model("m", None, 320, reads_bytes=True), ByteTokenizer)
    message = r"m has a vocabulary of 61 and no tokenizer\.json beside its weights; accepted without a tokenizer: bytes"
    with pytest.raises(ValueError, match=message):
        tokenizer_of_model("m", tmp_path, 61)
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"has \d+ tokens; accepted: at most the 61 of m"):
        tokenizer_of_model("m", tmp_path, 61)


def test_the_unknown_token_is_shown_though_it_is_special(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "[UNK]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with_model = tokenizer_of_model("m", tmp_path, 3, bos=2)
    assert with_model.encode("a b", start=True) == [2, 0, 1]
    assert with_model.decode([2, 0, 1]) == "a [UNK]"


def unigram(pieces: list[str], *, byte_fallback: bool = False) -> Tokenizer:
    """A Unigram model, as of SentencePiece: control tokens are pieces of it, with the best score of all."""
    scores = [(piece, 0.0 if piece.startswith("<") and len(piece) > 1 else -2.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def saved(tokenizer: Tokenizer, special: list[str], directory, **config) -> JsonTokenizer:
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    found = tokenizer_of_model("m", directory, 512)
    assert isinstance(found, JsonTokenizer)
    return found


def test_special_tokens_that_are_pieces_of_the_model_stay_text(tmp_path):
    special = ["<unk>", "<s>", "</s>", "|"]
    tokenizer = unigram([*special, "<", ">", "s", "/", "a", "\u2581"])
    with_model = saved(tokenizer, special, tmp_path, bos_token="<s>")
    for text in ("a<s>", "<s>", "a </s><s> a", "<<s>s>"):
        tokens = with_model.encode(text)
        assert not {1, 2} & set(tokens)
        assert with_model.decode(tokens) == text
        assert with_model.encode_batch([text.encode(), b"a"]) == [tokens, with_model.encode("a")]
    assert with_model.decode(with_model.encode("a|a")) == "a<unk>a"  # a single character has no other spelling


def test_special_tokens_that_are_words_of_the_model_become_unknown_ones(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "<s>": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with_model = saved(tokenizer, ["<s>", "[UNK]"], tmp_path, bos_token="<s>")
    assert with_model.encode("a <s> [UNK]", start=True) == [2, 0, 1, 1, 1]


def test_a_document_start_that_is_no_special_token_stays_text_too(tmp_path):
    tokenizer = unigram(["<unk>", "<", ">", "s", "a", "\u2581"])
    tokenizer.add_tokens(["<s>"])
    with_model = saved(tokenizer, ["<unk>"], tmp_path, bos_token="<s>")
    tokens = with_model.encode("a<s>a", start=True)
    assert tokens.count(with_model.document_start) == 1
    assert with_model.decode(tokens).replace(" ", "") == "a<s>a"


def test_byte_tokens_that_are_marked_special_are_still_bytes(tmp_path):
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = unigram(["<unk>", "<s>", "a", "\u2581", *fallback], byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    with_model = saved(tokenizer, ["<unk>", "<s>", *fallback], tmp_path, bos_token="<s>")
    assert with_model.decode(with_model.encode("a\u72b6\U0001f600")) == " a\u72b6\U0001f600"


def test_an_end_token_that_the_tokenizer_does_not_have_is_left_out_beside_a_start(tmp_path, tokenizer_file):
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")

    def written(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizer_of_model("m", tmp_path, 512)

    assert written(bos_token="<|endoftext|>", eos_token="<gone>").document_end is None
    assert written(bos_token="<|endoftext|>", eos_token="<|endoftext|>").document_end == 0
    for config in ({"eos_token": "<gone>"}, {"bos_token": "<gone>", "eos_token": "<|endoftext|>"}):
        with pytest.raises(ValueError, match=r"has no token '<gone>', its .os_token; special tokens: <\|endoftext"):
            written(**config)
