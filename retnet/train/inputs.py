"""Inputs of a run: the model that a recipe names, and the rows of its training and validation documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainingArguments

from retnet.data import Corpus, Mixture, PackedDataset, Rows, open_corpus
from retnet.data.chat_corpus import ChatCorpus, open_chats
from retnet.data.chat_template import ChatTemplate, find_chat_template
from retnet.data.conversations import conversation_files
from retnet.data.corpus import token_kind
from retnet.data.tokenizer import BYTES, DOCUMENT_START, VOCAB_SIZE
from retnet.data.tokenizer_json import TOKENIZER_FILE
from retnet.data.whole_rows import packed
from retnet.layers.block import Block
from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel
from retnet.ops.device import resolve_device
from retnet.stack.resolve import resolve_model, resolve_tokenizer, saved_directory, tokenizer_of
from retnet.train.float8 import use_float8
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.recipe import Recipe
from retnet.train.state_recipe import STATE
from retnet.train.state_tuning import StateTunedForCausalLM

RECOMPILE_LIMIT = 64
Wrap = Callable[[LanguageModel], PackedForCausalLM]


@dataclass(frozen=True)
class RunData:
    """Training rows, validation rows by name, and the corpora that they come from, by name."""

    train: Rows
    valid: Mapping[str, PackedDataset]
    corpora: Mapping[str, Corpus]

    @property
    def corpus(self) -> Corpus:
        """The first of them; all share vocabulary, document start and tokenizer."""
        return next(iter(self.corpora.values()))

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template of the conversations among them."""
        return next((corpus.template for corpus in self.corpora.values() if isinstance(corpus, ChatCorpus)), None)


def open_data(recipe: Recipe, arguments: TrainingArguments) -> RunData:
    """Open the sources and pack them. Raises FileNotFoundError or ValueError for sources that cannot be used."""
    sources = [*recipe.weights] + ([] if recipe.valid is None else [recipe.valid])
    everything = open_corpora(sources, recipe)
    opened = {source: everything[source] for source in recipe.weights}
    if recipe.valid is None:
        split = {source: corpus.split(recipe.valid_fraction) for source, corpus in opened.items()}
        train, valid = {s: pair[0] for s, pair in split.items()}, {s: pair[1] for s, pair in split.items()}
    else:
        train, valid = opened, {recipe.valid: everything[recipe.valid]}
        _check_same_tokens(next(iter(train.values())), valid[recipe.valid])
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    lanes = arguments.train_batch_size * arguments.world_size
    options: dict[str, Any] = {"carry_state": recipe.carry_state, "lanes": lanes if recipe.carry_state else 1}
    corpora = list(train.values())
    if len(corpora) == 1:
        rows: Rows = packed(corpora[0], recipe.length, seed, **options)
    else:
        rows = Mixture(corpora, list(recipe.weights.values()), recipe.length, seed, **options)
    return RunData(rows, {name: _valid_rows(c, recipe, arguments) for name, c in valid.items()}, train)


def open_corpora(sources: Sequence[str], recipe: Recipe) -> dict[str, Corpus]:
    """Each source, opened: conversations by the chat template of the model, everything else as it is.

    Raises ValueError for a chat template without conversations, and for conversations with a model that has no
    tokenizer.
    """
    files = {source: conversation_files(source) for source in sources}
    opened = {source: open_corpus(source) for source in sources if not files[source]}
    chats = [source for source in sources if files[source]]
    if not chats:
        if recipe.chat_template is not None:
            raise ValueError(
                f"chat_template is {recipe.chat_template!r}, and no source holds conversations; accepted with it: "
                "jsonl with messages"
            )
        return opened
    tokenizer = resolve_tokenizer(recipe.model)
    for corpus in opened.values():
        if tokenizer.same_tokens(corpus.tokenizer):  # one identity, so that the two can be mixed
            tokenizer = corpus.tokenizer
    directory = saved_directory(recipe.model)
    template = find_chat_template(recipe.chat_template, tokenizer, directory, for_training=True)
    if template is None:
        raise ValueError("chat_template is none with conversations; accepted: plain, or a file with a Jinja template")
    length = None if recipe.carry_state else recipe.length
    return opened | {source: open_chats(source, files[source], template, directory, length) for source in chats}


def _check_same_tokens(train: Corpus, valid: Corpus) -> None:
    """Raise ValueError if the validation data has another tokenizer: its loss would mean nothing."""
    (was, size, start), (other, other_size, other_start) = kinds = token_kind(train), token_kind(valid)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"valid {valid.name} is of tokenizer {other[:12]} ({other_size} tokens, {other_start} before a document); "
            f"accepted: that of {train.name}, {was[:12]} ({size} tokens, {start})"
        )


def _valid_rows(corpus: Corpus, recipe: Recipe, arguments: TrainingArguments) -> PackedDataset:
    """Rows in the given order, at most `valid_rows`; with carry_state all of them, in as many lanes as there are rows
    for, equally many per process."""
    if not recipe.carry_state:
        rows = packed(corpus, recipe.length, None)
        if recipe.valid_rows is not None:
            rows.sample(recipe.valid_rows)
        return rows
    if recipe.valid_rows is not None:
        raise ValueError("valid_rows leaves rows out, which carry_state does not allow; accepted: one of the two")
    available = -(-corpus.num_tokens // recipe.length)
    per_process = max(1, min(arguments.eval_batch_size, available // arguments.world_size))
    lanes = per_process * arguments.world_size
    return PackedDataset(corpus, recipe.length, None, carry_state=True, lanes=lanes)


def initial_model(
    recipe: Recipe,
    corpus: Corpus,
    seed: int,
    template: ChatTemplate | None = None,
    wrap: Wrap = PackedForCausalLM.trainable,
) -> PackedForCausalLM:
    """The model that a recipe names: a preset with weights drawn from the seed, a stack with weights drawn from its own
    seed, or a saved model to continue from. Weights in half precision become float32 for the training.

    template: of conversations; the token that ends a turn then ends a text too, unless the model's weights stay as they
    are (method=state), and with them its configuration. wrap: makes the model for training.

    Raises ValueError or OSError if there is none, or if it does not read the corpus's tokens.
    """
    model = resolve_model(recipe.model, seed=seed)
    check_reads(model, recipe.model, corpus)
    model.recompute = recipe.recomputed(model.recompute.level)
    if recipe.float8 is not None:
        use_float8(model, recipe.float8, resolve_device("auto"))
    if recipe.compile_options is not None:
        # Blocks are compiled once per configuration, with and without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(**recipe.compile_options)
    if recipe.method == STATE:
        return StateTunedForCausalLM.trainable(model)
    end = None if template is None else template.turn_end
    if end is not None and end not in model.config.eos_token_ids:
        ends = (*model.config.eos_token_ids, end)
        model.config = replace(model.config, eos_token_id=end if len(ends) == 1 else ends)
    return wrap(model)


def check_reads(model: LanguageModel, name: str, corpus: Corpus) -> None:
    """Raise ValueError unless the model, which messages call by this name, reads the corpus's tokens."""
    _check_tokenizer(model, corpus)
    _check_vocabulary(name, model.config, corpus)


def _check_tokenizer(model: LanguageModel, corpus: Corpus) -> None:
    """Raise ValueError if a saved model has a tokenizer, and it is not the corpus's."""
    file = None if model.directory is None else model.directory / TOKENIZER_FILE
    if file is None or not file.is_file():
        return
    own = tokenizer_of(model.config, model.directory)
    if not own.same_tokens(corpus.tokenizer):
        raise ValueError(
            f"{model.directory} reads the {own.vocab_size} tokens of its {TOKENIZER_FILE}, and {corpus.name} holds "
            f"others, of {corpus.vocab_size}; accepted: data in the model's own tokens (retnet data ... --tokenizer "
            f"{file}; bytes need none)"
        )


def _check_vocabulary(name: str, config: ModelConfig, corpus: Corpus) -> None:
    """Raise ValueError for tokens outside the vocabulary, and if only one of the two is bytes.

    Bytes are a vocabulary of 257, or one whose documents begin with token 256. Other tokens may be fewer than the
    vocabulary, which is often padded.
    """
    size, is_bytes = config.vocab_size, corpus.tokenizer_id == BYTES
    if size < corpus.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {size}; the tokens of {corpus.name} need {corpus.vocab_size}; accepted: a "
            f"model or stack with vocab_size {corpus.vocab_size} or more, or data in the model's tokens"
        )
    if is_bytes and size != VOCAB_SIZE and config.bos_token_id != DOCUMENT_START:
        raise ValueError(
            f"{name} has a vocabulary of {size}, and {corpus.name} is read as bytes, {VOCAB_SIZE} tokens; accepted: "
            f"data in the tokens of that vocabulary (retnet data SOURCE OUT --tokenizer {TOKENIZER_FILE}, then "
            f"data=OUT), or a model of bytes, such as retnet-tiny or a stack with vocab_size: {VOCAB_SIZE}"
        )
    if not is_bytes and config.bos_token_id == DOCUMENT_START != corpus.document_start:
        raise ValueError(
            f"{name} is a model of bytes, and {corpus.name} holds {corpus.vocab_size} tokens of a {TOKENIZER_FILE}; "
            "accepted: text, or shards of bytes (retnet data without --tokenizer)"
        )
