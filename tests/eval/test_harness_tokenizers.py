"""The same scores as `--model hf`, for every output type and every family of tokenizers, request by request."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import retnet.hf  # registers the classes
from retnet.data.tokenizer_json import JsonTokenizer
from retnet.models.directory import load_model, save_model
from retnet.models.hf.tokenizer import byte_tokenizer
from tests.small_models import small_model

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from retnet.eval.harness import RetNetLM  # noqa: E402

TEXTS = [
    "The state decays with every token.", "A token is read once, and the state grows no further.",
    "naïve φύσις 状态 😀", "line one\nline two\n\nline four", "1 + 1 = 2",
]  # fmt: skip
FAMILIES = ["bytes", "GPT-2", "Llama", "bos and eos apart"]


def like_gpt2(folder: Path) -> None:
    """Byte-level BPE; one special token, which is bos and eos and which encoding does not add."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, folder, ["<|endoftext|>"], alphabet, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def like_llama(folder: Path, *, start: str = "<s> $A") -> None:
    """Metaspace and byte fallback; bos before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if start != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(single=start, special_tokens=[("<s>", 1)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    train(tokenizer, folder, special, ["▁"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    file.write_text(json.dumps(data))


def train(tokenizer: Tokenizer, folder: Path, special: list[str], alphabet: list[str], **named: str) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory) -> Path:
    """A model whose greedy texts reach the end-of-text token."""
    folder = tmp_path_factory.mktemp("model")
    if request.param == "bytes":
        byte_tokenizer().save_pretrained(folder)
        size, end = 257, 256
    elif request.param == "GPT-2":
        like_gpt2(folder)
        size, end = 360, 0
    else:
        like_llama(folder, start="<s> $A" if request.param == "Llama" else "$A")
        size, end = 400, 2
    model = small_model("both decays", vocab_size=size)
    save_model(model, folder)
    free = RetNetLM(str(folder)).generate_until([request_of("generate_until", TEXTS[0], {"max_gen_toks": 12})])
    assert free[0]
    ids = RetNetLM(str(folder)).tok_encode(TEXTS[0])
    tokens = []
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
        model.head.weight[end] = 1.5 * model.head.weight[tokens[4]]  # there the end of the text is likelier
    save_model(model, folder)
    return folder


def request_of(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def both(directory) -> tuple[RetNetLM, HFLM]:
    theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1)
    return RetNetLM(str(directory)), theirs


PAIRS = [
    ("The state", " decays"), ("The state", " grows no further"), ("The state ", "decays"), ("", "A token"),
    ("A token is", " read\n"), ("naïve", " 状态 😀"), ("1 + 1 =", " 2"), (" ", "x"), ("<s>The", " state"),
    ("<|endoftext|>The", " state"), ("line one\n", "line two"),
]  # fmt: skip


def test_answers_have_the_scores_of_the_huggingface_interface(both):
    ours, theirs = both
    pairs = [pair for pair in PAIRS if pair[0].strip() or pair[0] == ""]
    requests = [request_of("loglikelihood", *pair) for pair in pairs]
    scores = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_rolling_documents_have_the_scores_of_the_huggingface_interface_with_one_start(both, directory):
    ours, _ = both
    theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, add_bos_token=False)
    requests = [request_of("loglikelihood_rolling", text) for text in [*TEXTS, "<s>spelt", "x"]]
    scores = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert scores == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-5)
    ids = [ours.prefix_token_id, *ours.tokenizer.encode(TEXTS[0], add_special_tokens=False)]
    with torch.no_grad():
        logs = load_model(directory)(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
    assert scores[0] == pytest.approx(sum(logs[t - 1, ids[t]].item() for t in range(1, len(ids))), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 16, "until": []},
        {"max_gen_toks": 16, "until": ["\n\n", "e"]},
        {"max_new_tokens": 5, "until": "a", "do_sample": False, "temperature": 0.7},
    ],
)
def test_texts_end_where_those_of_the_huggingface_interface_end(both, options):
    ours, theirs = both
    requests = [request_of("generate_until", text, dict(options)) for text in [*TEXTS[:3], "<s>spelt"]]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_text_ends_at_the_end_of_text_and_not_at_the_document_start(both):
    ours, _ = both
    (text,) = ours.generate_until([request_of("generate_until", TEXTS[0], {"max_gen_toks": 24})])
    assert len(ours.tokenizer.encode(text, add_special_tokens=False)) < 24
    model, ours.model = ours.model, load_model(ours.model.directory)
    with torch.no_grad():
        ours.model.head.weight[ours.eot_token_id] = -ours.model.head.weight[ours.eot_token_id]
    (longer,) = ours.generate_until([request_of("generate_until", TEXTS[0], {"max_gen_toks": 24})])
    ours.model = model
    assert longer != text


def test_the_document_start_is_added_or_left_out_as_with_the_huggingface_interface(both, directory):
    requests = [request_of("loglikelihood", "The state", " decays")]
    scores = []
    for add in (True, False, None):
        ours = RetNetLM(str(directory), add_bos_token=add)
        theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, add_bos_token=add)
        (score, _), (expected, _) = ours.loglikelihood(requests)[0], theirs.loglikelihood(requests)[0]
        assert score == pytest.approx(expected, rel=1e-5)
        scores.append(score)
    assert any(math.isclose(scores[2], score) for score in scores[:2])


def test_a_context_without_tokens_is_the_document_start(both):
    ours, _ = both
    alone, spaced = ours.loglikelihood([request_of("loglikelihood", "", "x"), request_of("loglikelihood", " ", "x")])
    assert math.isfinite(alone[0])
    assert math.isfinite(spaced[0])
    assert ours.generate_until([request_of("generate_until", "", {"max_gen_toks": 3})])[0] is not None


def test_a_tokenizer_of_ours_in_memory_gives_the_same_tokens(both, directory):
    ours, _ = both
    file = directory / "tokenizer.json"
    model = load_model(directory)
    own = retnet.load_tokenizer(model)
    for given in (RetNetLM(model), RetNetLM(model, own), RetNetLM(model, ours.tokenizer)):
        assert given.tok_encode(TEXTS[2]) == ours.tok_encode(TEXTS[2])
    if isinstance(own, JsonTokenizer):
        bare = directory / "bare"
        bare.mkdir(exist_ok=True)
        (bare / "tokenizer.json").write_bytes(file.read_bytes())
        alone = RetNetLM(model, JsonTokenizer(bare / "tokenizer.json", own.document_start, own.document_end))
        assert alone.tok_encode(TEXTS[2]) == ours.tok_encode(TEXTS[2])
        assert (alone.prefix_token_id, alone.eot_token_id) == (ours.prefix_token_id, ours.eot_token_id)


def test_options_of_generation_that_are_not_understood_are_refused(both):
    ours, _ = both
    with pytest.raises(ValueError, match="generation_kwargs has num_beams; accepted: until, do_sample"):
        ours.generate_until([request_of("generate_until", "x", {"num_beams": 4})])
