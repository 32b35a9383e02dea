"""The tokenizer beside a trained model: that of its data, with the chat template that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retnet.data import Corpus
from retnet.data.chat_files import DEFAULT, read_chat_files
from retnet.data.chat_template import ChatTemplate
from retnet.models.hf.tokenizer import byte_tokenizer


def tokenizer_to_save(
    corpus: Corpus, directory: Path | None = None, template: ChatTemplate | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a corpus, for transformers, with everything that the configuration beside it says.

    directory: of the model that training began from, whose chat template is kept if the data has none. template: of
    conversations that it was trained on, which takes precedence.

    The document start begins texts. The document end ends them; without one the configuration's eos token, and without
    that the start. The pad is the configuration's, or a special token that calls itself one, or the start.
    """
    tokenizer = byte_tokenizer() if corpus.tokenizer_directory is None else _of_directory(corpus)
    if template is not None:
        tokenizer.chat_template = _for_transformers(template.sources)
    elif not tokenizer.chat_template and directory is not None:
        tokenizer.chat_template = _for_transformers(read_chat_files(directory).templates)
    return tokenizer


def _of_directory(corpus: Corpus) -> PreTrainedTokenizerBase:
    assert corpus.tokenizer_directory is not None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(corpus.tokenizer_directory)
    start, end = corpus.document_start, corpus.tokenizer.document_end
    start = tokenizer.convert_ids_to_tokens(start)
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    elif tokenizer.eos_token is None:
        tokenizer.eos_token = start
    if tokenizer.pad_token is None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        pads = (token for token in special if "pad" in token.lower() and token != start)
        tokenizer.pad_token = next(pads, start)
    tokenizer.bos_token = start
    return tokenizer


def _for_transformers(sources: Mapping[str, str]) -> str | dict[str, str] | None:
    """One template as text, several by name, none as None."""
    return sources.get(DEFAULT) if sources.keys() <= {DEFAULT} else dict(sources)
